"""Denoisers as other codebases write them: what is found is the truth written by hand, and they quantize, save and load."""

import pytest
import torch
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.styles import STYLES, MagnitudeLayer
from benchmarks.networks.zoo import depends
from benchmarks.networks.zoo.oracle import WEIGHTED
from tests.helpers.blocks import layer_paths
from tests.helpers.nearest import recipe
from tfmq_fx.capturing.calibrated import captured
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.passes import find_temporal

NEAREST = recipe("w8a8")
ROWS = 30
# Rounding to 255 steps of a range of r standard deviations errs by r / (255 * sqrt(12)) of one: 0.7% at r = 6. Weights
# and inputs of at most fifteen layers in a row add up as noise does: sqrt(2 * 15) * 0.7% = 3.8%.
BOUND = 0.038


@pytest.fixture(scope="module", params=STYLES, ids=[s.entry.name for s in STYLES])
def case(request):
    network = request.param.entry.build(False)
    data = tfmq_fx.CalibrationSet.from_tensors(
        request.param.inputs(ROWS), timestep=request.param.entry.timestep
    )
    return request.param, network, data


def test_the_truth_agrees_with_perturbing_the_inputs(case):
    style, network, _ = case
    entry = style.entry
    reached = depends(entry, network, weighted=(*WEIGHTED, MagnitudeLayer))
    assert set(entry.pure_layers) == {path for path, by in reached.items() if by == {entry.timestep}}
    assert all(reached[path] and reached[path] <= set(entry.keys) for path in entry.layers)
    assert all(entry.timestep in reached[path] for path in entry.features)


def test_the_block_is_the_one_written_down_and_the_graph_computes_the_network(case):
    style, network, data = case
    entry = style.entry
    gm, _, _ = captured(network, data, entry.timestep)
    temporal, alone = find_temporal(gm), find_temporal(gm, conditioning=())
    assert layer_paths(gm, temporal.features) == set(entry.features)
    assert layer_paths(gm, temporal.nodes) == set(entry.layers)
    assert set(temporal.keys) == set(entry.keys)
    assert layer_paths(gm, alone.features) == set(entry.pure_features)
    assert layer_paths(gm, alone.nodes) == set(entry.pure_layers)
    inputs = style.inputs(5)
    with torch.no_grad():
        assert_equal(gm(*[inputs[n] for n in placeholders(gm)]), network(**inputs))


def assert_equal(a, b):
    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_quantizes_saves_and_loads(case, tmp_path):
    style, network, data = case
    entry = style.entry
    q = tfmq_fx.quantize(network, NEAREST, calibration=data, timestep=entry.timestep)
    inputs = style.inputs(ROWS)
    with torch.no_grad():
        expected, found = pytree.tree_leaves(network(**inputs)), pytree.tree_leaves(q(**inputs))
    for x, y in zip(expected, found, strict=True):
        assert 1e-5 < (y - x).norm() / x.norm() < BOUND  # quantized, and near
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    with torch.no_grad():
        assert_equal(loaded(**inputs), found)
