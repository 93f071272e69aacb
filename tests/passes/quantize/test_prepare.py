import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, ScalarTime, calibration, captured, make, prepared
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.observers import PerChannelWeightFakeQuantize, StaticFakeQuantize, TemporalObserver
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.passes.temporal.insert_step_index import step_index

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]


def test_observers_stand_where_they_should():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    kinds = [type(o).__mro__ for _, o in observers(gm)]
    count = lambda cls: sum(cls in mro for mro in kinds)  # noqa: E731
    assert count(PerChannelWeightFakeQuantize) == 14
    assert count(TemporalObserver) == 4
    assert (
        count(StaticFakeQuantize) == 8
    )  # conv1 and conv2 twice, down, qkv, out, skip; the inputs of the first and last stay float
    for node, observer in observers(gm):
        if isinstance(observer, TemporalObserver):
            assert node.args[1] is step_index(gm)


def test_prepare_leaves_the_float_graph_alone():
    gm = captured()
    before = [n.format_node() for n in gm.graph.nodes]
    with torch.no_grad():
        expected = gm(X, T)
        prepared_graph = tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=TIMESTEPS)
        assert [n.format_node() for n in gm.graph.nodes] == before
        assert torch.equal(gm(X, T), expected)
        assert torch.equal(prepared_graph(X, T), expected)  # observing changes nothing


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        (torch.tensor([]), "at least one value"),
        (torch.tensor([1, 1, 2]), "repeated"),
        (torch.tensor([1.0, torch.nan]), "NaN"),
        (torch.tensor([[1, 2]]), "1-D"),
        (7, "timesteps: expected a list of numbers, found 7"),
        (["soon"], "timesteps: expected a list of numbers"),
    ],
)
def test_bad_schedules_are_refused(timesteps, words):
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=timesteps)


def test_a_schedule_may_be_any_list_of_numbers():
    found = [
        state_of(tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=t)).timesteps
        for t in (TIMESTEPS, TIMESTEPS.tolist(), iter(TIMESTEPS.tolist()))
    ]
    assert all(torch.equal(t, TIMESTEPS) for t in found)


def test_a_zero_channel_quantizes_to_zero():
    network = make(type(make(ScalarTime)))
    with torch.no_grad():
        network.body.weight[1] = 0
        network.head.weight[2] = network.head.weight[2].abs()  # one-signed
    gm = tfmq_fx.capture(network, {"sample": torch.randn(2, 4), "timestep": torch.tensor(7)})
    gm = tfmq_fx.prepare(gm, tfmq_fx.Recipe(weight_bits=4, edge_weight_bits=4), timesteps=TIMESTEPS)
    weights = {
        str(n.args[0].target): o for n, o in observers(gm) if isinstance(o, PerChannelWeightFakeQuantize)
    }
    assert torch.isfinite(weights["body.weight"].scale).all()
    assert torch.equal(weights["body.weight"].dequantized()[1], torch.zeros(4))
    for o in weights.values():
        assert ((o.zero_point >= 0) & (o.zero_point <= 15)).all()


def test_the_name_of_a_preset_is_refused():
    with pytest.raises(TFMQError, match=r"recipe: expected Recipe, found str; use Recipe\.preset\(name\)"):
        tfmq_fx.prepare(captured(), "w4a8", timesteps=TIMESTEPS)


def test_a_network_in_float64_is_refused():
    gm = captured()
    gm.get_submodule("down").double()
    with pytest.raises(TFMQError, match=r"weight down\.weight: is torch\.float64"):
        tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=TIMESTEPS)


def test_each_weight_is_dequantized_just_before_it_is_read():
    """At the start, where torchao puts the observers of weights, a call would hold all of them at once."""

    def waits(gm, found):
        place = {n: i for i, n in enumerate(gm.graph.nodes)}
        return [min(place[u] for u in n.users) - place[n] for n in gm.graph.nodes if found(n)]

    gm = prepared()
    of_weights = {n for n, o in observers(gm) if isinstance(o, PerChannelWeightFakeQuantize)}
    assert waits(gm, of_weights.__contains__) == [1] * len(of_weights)
    dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
    converted = tfmq_fx.convert(gm)
    for part in (converted, converted.get_submodule("temporal_block")):
        found = waits(part, lambda n: n.target == dequantize and n.args[0].op == "get_attr")
        assert found
        assert max(found) <= 5  # bias, and the parts of another weight
