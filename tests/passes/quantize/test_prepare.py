import dataclasses

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, ScalarTime, calibration, captured, make, prepared
from tfmq_fx.artefact.graph_json import quantized_weights, tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name, weight_argument
from tfmq_fx.observers import PerChannelWeightFakeQuantize, StaticFakeQuantize, TemporalObserver
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.temporal.insert_step_index import insert_step_index, step_index

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]


def bits_by_layer(gm):
    return {
        layer.path.removesuffix(".weight"): (layer.weight_bits, layer.activation_bits)
        for layer in gm.meta["plan"].layers
    }


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w8a16", "w4a16", "w4a4", "w3a8", "w2a8"])
def test_every_preset_gives_every_layer_its_bits(name):
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe.preset(name), timesteps=TIMESTEPS)
    weight, activation = (int(b) for b in name[1:].split("a"))
    found = bits_by_layer(gm)
    assert found["conv_in"] == found["conv_out"] == (8, 16)
    assert found["time_mlp.0"] == (8, activation)  # the first time-embedding layer
    others = {path: bits for path, bits in found.items() if path not in ("conv_in", "conv_out", "time_mlp.0")}
    assert set(others.values()) == {(weight, activation)}
    assert {"down", "up_block.skip", "attention.qkv", "attention.out", "down_block.emb"} <= set(others)


def test_observers_stand_where_they_should():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe.preset("w4a8"), timesteps=TIMESTEPS)
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
        prepared_graph = tfmq_fx.prepare(gm, tfmq_fx.Recipe.preset("w4a8"), timesteps=TIMESTEPS)
        assert [n.format_node() for n in gm.graph.nodes] == before
        assert torch.equal(gm(X, T), expected)
        assert torch.equal(prepared_graph(X, T), expected)  # observing changes nothing


def test_the_step_index_is_computed_once_and_nearest():
    gm = captured()
    assert insert_step_index(gm, timesteps=TIMESTEPS).modified
    assert not insert_step_index(gm, timesteps=TIMESTEPS).modified
    assert [op_name(n) for n in gm.graph.nodes].count("argmin") == 1
    index = torch.fx.Interpreter(gm)
    gm.graph.output_node().args = (step_index(gm),)
    values = torch.tensor([900, 0, 449, 451, 5000, 100])
    assert index.run(torch.zeros(6, 1, 8, 8), values).tolist() == [0, 9, 5, 4, 0, 8]


@pytest.mark.parametrize(
    "changes", [{}, {"keyed": "all"}, {"attention_bits": 8}, {"edge_activation_bits": 8}]
)
def test_the_converted_graph_equals_the_prepared_one(changes):
    gm = prepared(**changes)
    q = tfmq_fx.convert(gm)
    with torch.no_grad():
        expected, got = gm(X, T), q(X, T)
    # Fake quantize rounds zero_point + x / s, the graph round(x / s) + zero_point: a tie may go the other way, so an
    # activation may differ by a step in rare places. Nothing else may.
    step = (expected.max() - expected.min()) / 255
    assert (got - expected).abs().max() <= 2 * step
    assert (got != expected).float().mean() < 0.01


def test_the_converted_graph_holds_integers_and_one_temporal_block():
    q = tfmq_fx.convert(prepared())
    integers = quantized_weights(q)
    assert len(integers) == 14
    for name, (low, high) in integers.items():
        value = tensors_of(q)[name]
        assert value.dtype in (torch.int8, torch.uint8)
        assert low <= value.min() <= value.max() <= high
    assert not any(
        name.removesuffix("_q") in dict(q.named_parameters()) for name in integers
    )  # float weights are gone
    assert [n.target for n in q.graph.nodes if n.op == "call_module"] == ["temporal_block"]
    block = q.get_submodule("temporal_block")
    assert [op_name(n) for n in block.graph.nodes].count("argmin") == 1
    assert len(block.graph.output_node().args[0]) == 2
    for module in (q, block):
        for node in module.graph.nodes:
            if weight_argument(node) is not None:
                assert op_name(node.args[weight_argument(node)]) == "dequantize_per_channel"


def test_mixed_timesteps_equal_one_sample_at_a_time():
    q = tfmq_fx.convert(prepared(keyed="all"))
    x, t = X[:6], torch.tensor([900, 0, 300, 300, 100, 451])
    with torch.no_grad():
        together = q(x, t)
        alone = torch.cat([q(x[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone)


def test_dequantized_integers_are_what_the_prepared_graph_used():
    gm = prepared()
    tfmq_fx.reconstruct(gm, calibration())
    used = {
        str(n.args[0].target): o.dequantized()
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
    }
    q = tfmq_fx.convert(gm)
    for module in (q, q.get_submodule("temporal_block")):
        interpreter = torch.fx.Interpreter(module)
        for node in module.graph.nodes:
            if op_name(node) == "dequantize_per_channel" and node.args[0].op == "get_attr":
                for arg in node.all_input_nodes:
                    interpreter.env[arg] = interpreter.run_node(arg)
                value = interpreter.run_node(node)
                assert torch.equal(value, used.pop(str(node.args[0].target).removesuffix("_q")))
    assert not used


def test_a_scalar_timestep_network_runs_through():
    network = make(ScalarTime)
    gm = tfmq_fx.capture(network, {"sample": torch.randn(2, 4), "timestep": torch.tensor(7)})
    data = tfmq_fx.CalibrationSet.from_tensors(
        {"sample": torch.randn(40, 4), "timestep": TIMESTEPS.repeat(4)}
    )
    gm = tfmq_fx.prepare(gm, tfmq_fx.Recipe(reconstruction=FAST, weight_bits=8), timesteps=TIMESTEPS)
    tfmq_fx.reconstruct(tfmq_fx.calibrate(gm, data), data)
    q = tfmq_fx.convert(gm)
    x = torch.randn(3, 4)
    with torch.no_grad():
        error = (q(x, torch.tensor(400)) - network(x, torch.tensor(400))).abs().max()
        assert 0 < error < 0.05  # 8-bit weights and activations of a network of three layers


def test_rules_change_bits_and_a_rule_without_a_match_shows_the_nearest():
    rules = (
        tfmq_fx.Rule(pattern="attention.*", weight_bits=8),
        tfmq_fx.Rule(pattern="down.*", weight_bits=16, activation_bits=16),
    )
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(rules=rules), timesteps=TIMESTEPS)
    assert bits_by_layer(gm)["attention.qkv"] == (8, 8)
    assert bits_by_layer(gm)["down"] == (16, 16)
    assert "down.weight" in {f.name for f in gm.meta["plan"].floats}
    with pytest.raises(TFMQError, match=r"'atention\.\*' matches no layer .*; nearest are attention"):
        tfmq_fx.prepare(
            captured(), tfmq_fx.Recipe(rules=(tfmq_fx.Rule(pattern="atention.*"),)), timesteps=TIMESTEPS
        )


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits", "edge_weight_bits", "attention_bits"])
def test_bits_outside_the_supported_are_refused(field):
    with pytest.raises(TFMQError, match=rf"Recipe\.{field}: 9 is not a supported bit width"):
        dataclasses.replace(tfmq_fx.Recipe(), **{field: 9})


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        (torch.tensor([]), "at least one value"),
        (torch.tensor([1, 1, 2]), "repeated"),
        (torch.tensor([1.0, torch.nan]), "NaN"),
        (torch.tensor([[1, 2]]), "1-D"),
        (7, "timesteps: a list of numbers is needed, found 7"),
        (["soon"], "timesteps: a list of numbers"),
    ],
)
def test_bad_schedules_are_refused(timesteps, words):
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=timesteps)


def test_a_schedule_may_be_any_list_of_numbers():
    found = [
        tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=t).meta["timesteps"]
        for t in (TIMESTEPS, TIMESTEPS.tolist(), iter(TIMESTEPS.tolist()))
    ]
    assert all(torch.equal(t, TIMESTEPS) for t in found)


def test_stages_out_of_order_are_refused():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match="prepare, calibrate, reconstruct, convert"):
        tfmq_fx.convert(gm)
    with pytest.raises(TFMQError, match="needs it calibrated"):
        tfmq_fx.reconstruct(gm, calibration())


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


def test_constant_activations_give_finite_scales():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.first, self.body = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            emb = self.time(timestep.float()[:, None] * torch.zeros(4))
            return self.body(self.first(sample) * 0 + 3.0) + emb

    gm = tfmq_fx.capture(Constant().eval(), {"sample": torch.randn(2, 4), "timestep": torch.tensor([1, 2])})
    gm = tfmq_fx.prepare(gm, tfmq_fx.Recipe(edge_activation_bits=8), timesteps=torch.tensor([1, 2]))
    data = tfmq_fx.CalibrationSet.from_tensors(
        {"sample": torch.randn(8, 4), "timestep": torch.tensor([1, 2]).repeat(4)}
    )
    q = tfmq_fx.convert(tfmq_fx.calibrate(gm, data))
    with torch.no_grad():
        assert torch.isfinite(q(torch.randn(3, 4), torch.tensor([1, 2, 2]))).all()


def test_a_half_precision_network_is_refused():
    gm = captured()
    gm.get_submodule("down").half()
    with pytest.raises(TFMQError, match=r"weight down\.weight: is torch\.float16"):
        tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=TIMESTEPS)
