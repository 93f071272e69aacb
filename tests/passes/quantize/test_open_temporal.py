"""Temporal features as inputs of the graph, and a graph in which nothing is quantized."""

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, TinyUNet, make
from tests.helpers.maintenance import NEAREST, Nested, features, prepared
from tests.helpers.precomputed import example, noise
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.passes import open_temporal, prepare_float
from tfmq_fx.passes.quantize.state import state_of


@pytest.mark.parametrize("network", [TinyUNet, Nested])
def test_the_features_are_the_last_inputs_and_the_layers_are_gone(network):
    gm = prepared(network)
    values = dict(zip(state_of(gm).features, features(gm), strict=True))
    before = gm(noise(10), TIMESTEPS)
    assert open_temporal(gm, features=values).modified
    assert list(placeholders(gm)) == ["sample", "timestep", *values]
    assert state_of(gm).outside == tuple(values)
    assert not any(layer.temporal for layer in state_of(gm).plan.layers)
    assert not any("time" in name or "emb" in name for name in tensors_of(tfmq_fx.convert(gm)))
    assert torch.equal(gm(noise(10), TIMESTEPS, *values.values()), before)


def test_one_feature_leaves_what_the_other_needs():
    gm = prepared(Nested)
    first, second = state_of(gm).features
    value = features(gm)[1]
    before = gm(noise(10), TIMESTEPS)
    open_temporal(gm, features=[second])
    assert state_of(gm).features == (first,)
    assert torch.equal(gm(noise(10), TIMESTEPS, value), before)


def test_a_second_run_changes_nothing():
    gm = prepared()
    names = state_of(gm).features
    open_temporal(gm, features=names)
    assert not open_temporal(gm, features=names).modified


def test_an_unknown_feature_and_a_float_graph_are_refused():
    with pytest.raises(TFMQError, match="features: 'conv2d' is not a temporal feature; features are"):
        open_temporal(prepared(), features=["conv2d"])
    with pytest.raises(TFMQError, match="the graph is a float graph"):
        open_temporal(tfmq_fx.capture(make(TinyUNet), example(TinyUNet)), features=[])


def test_a_graph_in_which_nothing_is_quantized():
    plain = tfmq_fx.capture(make(TinyUNet), example(TinyUNet))
    nodes = len(plain.graph.nodes)
    gm = prepare_float(plain, tfmq_fx.Recipe(reconstruction=NEAREST), timesteps=TIMESTEPS)
    assert len(plain.graph.nodes) == nodes
    assert torch.equal(gm(noise(10), TIMESTEPS), plain(noise(10), TIMESTEPS))
    state = state_of(gm)
    assert (state.stage, state.plan.layers) == ("calibrated", ())
    assert state.feature_paths == ("down_block.emb.weight", "up_block.emb.weight")
    with pytest.raises(TFMQError, match="timesteps: found repeated values"):
        prepare_float(plain, tfmq_fx.Recipe(reconstruction=NEAREST), timesteps=[1, 1])
