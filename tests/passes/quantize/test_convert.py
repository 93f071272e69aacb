"""The graph of integers is the prepared one."""

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, ScalarTime, calibration, captured, make, prepared
from tfmq_fx.artefact.graph_json import quantized_weights, tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name, weight_argument
from tfmq_fx.observers import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.observed import observers

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]


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


def test_stages_out_of_order_are_refused():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match="prepare, calibrate, reconstruct, convert"):
        tfmq_fx.convert(gm)
    with pytest.raises(TFMQError, match="needs one that is calibrated"):
        tfmq_fx.reconstruct(gm, calibration())


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


def test_tensors_lie_as_they_do_once_loaded():
    """A 1x1 weight whose strides are channels-last counts as contiguous, but torch picks other kernels for it."""
    gm = prepared(rules=(tfmq_fx.Rule(pattern="*", weight_bits=16),))
    for p in gm.parameters():
        p.data = p.data.to(memory_format=torch.channels_last) if p.dim() == 4 else p.data
    assert any(not p.is_contiguous() for p in gm.parameters())
    q = tfmq_fx.convert(gm)
    for x in tensors_of(q).values():
        assert x.stride() == torch.empty(x.shape).stride()
    with torch.no_grad():
        torch.testing.assert_close(q(X, T), gm(X, T))
