"""Real architectures, reduced: the block that dataflow finds is the one written down by hand in tests/zoo.py."""

import pytest
import torch
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.zoo import ZOO, depends
from benchmarks.networks.zoo.experts import EXPERTS
from benchmarks.networks.zoo.grown import by_name, grown
from benchmarks.networks.zoo.joint import JOINT
from benchmarks.networks.zoo.newest import NEWEST
from benchmarks.networks.zoo.recent import RECENT
from tests.helpers.blocks import layer_paths
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.passes import extract_temporal, find_temporal, partition_temporal

ENTRIES = {e.name: e for e in ZOO}
# The oracle computes in float64; a network that casts to float32 inside warns of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    # diffusers' own
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]


# Near twins of others (the same class with other widths, or one more conditioning), and those that take longest.
# Pipelines of sd-xl, latent-diffusion and pixart are in test_pipelines.py.
TWINS = (
    "ddpm-lsun",
    "ddpm-class-conditional",
    "sd-2.1",
    "lcm",
    "sd-x4-upscaler",
    "sd-unclip",
    "pixart-512",
    "ddim-official",
)
LONG = ("kandinsky-3", "text-to-video", "stable-video-diffusion", "sd-xl", "latent-diffusion", "pixart-1024")
IN_CI = ("ltx", "unclip-prior")  # of the recent ones, which are many
SLOW = (*TWINS, *LONG, *(e.name for e in (*RECENT, *NEWEST, *JOINT, *EXPERTS) if e.name not in IN_CI))
# Their rows are repeated for each frame behind the block's layers: products with fewer rows, summed in another order.
REASSOCIATED = ("text-to-video", "stable-video-diffusion", "i2vgen-xl", "animatediff")
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in ENTRIES]


@pytest.fixture(scope="module", params=NAMES)
def captured(request):
    entry = ENTRIES[request.param]
    torch.manual_seed(0)
    network = entry.build(False)
    return entry, network, tfmq_fx.capture(network, entry.inputs(False), timestep=entry.timestep)


def test_the_hand_written_truth_agrees_with_perturbing_the_inputs(captured):
    entry, network, _ = captured
    reached = depends(entry, network)
    conditioning = set(entry.keys)
    alone = {path for path, inputs in reached.items() if inputs == {entry.timestep}}
    assert set(entry.pure_layers) == alone
    assert all(reached[path] <= conditioning and reached[path] for path in entry.layers)
    assert all(entry.timestep in reached[path] for path in entry.features)


def test_the_block_is_the_one_written_down(captured):
    entry, _, gm = captured
    temporal = find_temporal(gm)
    assert layer_paths(gm, temporal.features) == set(entry.features)
    assert layer_paths(gm, temporal.nodes) == set(entry.layers)
    assert set(temporal.keys) == set(entry.keys)
    assert temporal.keys[0] == entry.timestep


def test_the_part_of_the_timestep_alone_is_the_one_written_down(captured):
    entry, _, gm = captured
    alone = find_temporal(gm, conditioning=())
    assert layer_paths(gm, alone.features) == set(entry.pure_features)
    assert layer_paths(gm, alone.nodes) == set(entry.pure_layers)


def test_capture_and_partition_are_exact_at_another_batch_size(captured):
    entry, network, gm = captured
    network, inputs = grown(entry, network)
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    with torch.no_grad():
        expected = pytree.tree_leaves(network(**inputs))[0]
        flat = by_name(inputs)
        assert len(flat) == len(tensors)
        values = [flat[n] for n in placeholders(gm)]
        found = pytree.tree_leaves(gm(*values))[0]
        if entry.name in REASSOCIATED:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found, expected)
        temporal = find_temporal(gm)
        block = extract_temporal(gm, temporal)
        assert set(placeholders(block)) == set(entry.keys)
        gm2 = fresh(gm)
        partition_temporal(gm2, temporal=temporal)
        assert torch.equal(pytree.tree_leaves(gm2(*values))[0], found)
