"""The passes in front of a target with int8 kernels, on graphs small enough to read."""

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from benchmarks.networks.small import TinyUNet, make
from tfmq_fx.base.arithmetic import IntegerRange, choose_qparams, quantize_rows
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name, weight_argument
from tfmq_fx.passes import byte_activations, integer_weights, rescale_temporal
from tfmq_fx.passes.int8.rescale_temporal import PRECISE

ops = torch.ops.quantized_decomposed
T, BITS = 5, IntegerRange.activation(8)
# Rescaling moves the zero point into the rounding and reorders the sum: some float32 steps of the largest output.
CLOSE = 1e-5


class Keyed(nn.Module):
    """An activation with one row of qparams per step, in front of `layer`; `twice`: something else reads it, too."""

    def __init__(self, layer, *, bits=8, scalar=False, twice=False, zero_points=(0, 17, 128, 200, 255)):
        super().__init__()
        weight = layer.weight.detach()
        self.axis = 1 if "Transpose" in type(layer).__name__ else 0
        self.weights = IntegerRange.weight(bits)
        rows = weight.movedim(self.axis, 0).flatten(1)
        self.scale, self.zero_point = (
            nn.Buffer(b) for b in choose_qparams(rows.amin(1), rows.amax(1), self.weights)
        )
        self.q = nn.Buffer(quantize_rows(weight, self.scale, self.zero_point, self.weights, self.axis))
        self.scales = nn.Buffer(torch.linspace(0.01, 0.03, T))
        self.zero_points = nn.Buffer(torch.tensor(zero_points, dtype=torch.int32))
        self.bias, self.layer, self.scalar, self.twice = layer.bias, layer, scalar, twice

    def forward(self, x, step):
        s, z = self.scales.index_select(0, step), self.zero_points.index_select(0, step)
        if self.scalar:
            limits = (0, 255, torch.uint8)
            q = ops.quantize_per_tensor.tensor(x, s, z, *limits)
            y = ops.dequantize_per_tensor.tensor(q, s, z, *limits)
        else:
            limits = (0, 0, 255, torch.uint8)
            q = ops.quantize_per_channel.default(x, s, z, *limits)
            y = ops.dequantize_per_channel.default(q, s, z, *limits)
        w = self.weights
        weight = ops.dequantize_per_channel.default(
            self.q, self.scale, self.zero_point, self.axis, w.quant_min, w.quant_max, w.dtype
        )
        if isinstance(self.layer, nn.Linear):
            out = nn.functional.linear(y, weight, self.bias)
        elif isinstance(self.layer, nn.ConvTranspose2d):
            out = nn.functional.conv_transpose2d(y, weight, self.bias, self.layer.stride, self.layer.padding)
        else:
            out = nn.functional.conv2d(y, weight, self.bias, self.layer.stride, self.layer.padding)
        return (out, torch.sin(y)) if self.twice else out


def graph_of(module, x, step):
    dynamic = [
        {0: torch.export.Dim.AUTO},
        {0: torch.export.Dim.AUTO} if step.dim() and len(step) > 1 else None,
    ]
    with torch.no_grad():
        program = torch.export.export(module.eval(), (x, step), dynamic_shapes=dynamic, strict=False)
        return program.module(check_guards=False)


def operators(gm):
    return [op_name(n) for n in gm.graph.nodes if n.op == "call_function"]


LINEAR = (nn.Linear(6, 4), (6,))
LAYERS = {
    "linear": LINEAR,
    "linear of sequences": (nn.Linear(6, 4, bias=False), (3, 6)),
    "convolution": (nn.Conv2d(3, 4, 3, padding=1), (3, 7, 5)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=2, bias=False), (3, 7, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (3, 7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_rescaled_layers_compute_the_same_up_to_the_border(name, bits):
    layer, shape = LAYERS[name]
    module = Keyed(layer, bits=bits, twice=True)
    gm = graph_of(module, torch.randn(2, *shape), torch.tensor([0, 1]))
    assert rescale_temporal(gm).modified
    for steps in ([0, 1, 2, 3, 4], [2], [4, 4, 0]):
        x, step = torch.randn(len(steps), *shape), torch.tensor(steps)
        for got, expected in zip(gm(x, step), module(x, step), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=CLOSE * expected.abs().max().item())


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_zero_point_that_all_steps_share_costs_one_multiplication(name):
    layer, shape = LAYERS[name]
    module = Keyed(layer, twice=True, zero_points=[90] * T)
    gm = graph_of(module, torch.randn(2, *shape), torch.tensor([0, 1]))
    rescale_temporal(gm)
    assert not {"add", "sub"} & (set(operators(gm)) - ({"add"} if layer.bias is not None else set()))
    assert not any(n.meta.get(PRECISE) for n in gm.graph.nodes)
    x, step = torch.randn(T, *shape), torch.arange(T)
    for got, expected in zip(gm(x, step), module(x, step), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=CLOSE * expected.abs().max().item())


@torch.no_grad()
def test_one_scale_for_the_whole_batch():
    module = Keyed(*LINEAR[:1], scalar=True)
    x = torch.randn(3, 6)
    gm = graph_of(module, x, torch.tensor([1]))
    rescale_temporal(gm)
    for step in range(T):
        torch.testing.assert_close(gm(x, torch.tensor([step])), module(x, torch.tensor([step])))


def test_rescaled_qparams_are_constant_and_the_weight_stays_one_constant():
    gm = graph_of(Keyed(LINEAR[0]), torch.randn(2, 6), torch.tensor([0, 1]))
    rescale_temporal(gm)
    assert operators(gm) == [
        "index_select",  # the scale
        "view",
        "index_select",  # z - c
        "view",
        "reciprocal",
        "mul",
        "add",
        "quantize_per_tensor",
        "dequantize_per_tensor",
        "dequantize_per_channel",  # the weight
        "linear",
        "mul",
        "sub",
        "mul",
        "add",
    ]
    quantize = gm.graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default)[0]
    assert quantize.args[1:] == (1.0, 127, 0, 255, torch.uint8)
    assert not rescale_temporal(gm).modified


def test_a_graph_without_shapes_is_refused():
    gm = graph_of(Keyed(LINEAR[0]), torch.randn(2, 6), torch.tensor([0, 1]))
    for node in gm.graph.nodes:
        node.meta = {}
    with pytest.raises(TFMQError, match=r"node x: its shape is unknown"):
        rescale_temporal(gm)


def test_a_reader_of_the_integers_is_refused():
    gm = graph_of(Keyed(LINEAR[0]), torch.randn(2, 6), torch.tensor([0, 1]))
    quantize = gm.graph.find_nodes(op="call_function", target=ops.quantize_per_channel.default)[0]
    with gm.graph.inserting_after(quantize):
        gm.graph.call_function(torch.ops.aten.neg.default, (quantize,))
    with pytest.raises(TFMQError, match=r"node neg\w*: reads the integers of quantize_per_channel"):
        rescale_temporal(gm)


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@torch.no_grad()
def test_weights_become_signed_bytes_bit_for_bit(bits):
    module = Keyed(LINEAR[0], bits=bits)
    x, step = torch.randn(2, 6), torch.tensor([0, 1])
    gm = graph_of(module, x, step)
    expected = gm(x, step)
    assert integer_weights(gm).modified
    assert torch.equal(gm(x, step), expected)
    assert gm.q_int8.dtype == torch.int8
    assert operators(gm).count("sub") == 0
    assert not integer_weights(gm).modified


@torch.no_grad()
def test_a_weight_that_does_not_fit_a_signed_byte_keeps_its_zero_point():
    module = Keyed(LINEAR[0])
    module.q, module.zero_point = module.q.view(torch.uint8), torch.full((4,), 3, dtype=torch.int32)
    module.weights = BITS
    x, step = torch.randn(2, 6), torch.tensor([0, 1])
    gm = graph_of(module, x, step)
    expected = gm(x, step)
    integer_weights(gm)
    assert gm.q_int8.dtype == torch.uint8
    assert operators(gm).count("sub") == 1
    assert torch.equal(gm(x, step), expected)


class Static(nn.Module):
    def forward(self, x):
        limits = (0.1, 5, 0, 15, torch.uint8)
        return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *limits), *limits)


@torch.no_grad()
def test_narrow_activations_become_bytes_bit_for_bit():
    x = torch.randn(1000)
    gm = torch.export.export(Static(), (x,)).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    assert byte_activations(gm).modified
    assert operators(gm) == ["clamp", "quantize_per_tensor", "dequantize_per_tensor"]
    assert {n.args[3:] for n in gm.graph.nodes if "quantize" in op_name(n)} == {(0, 255, torch.uint8)}
    assert torch.equal(gm(x), Static()(x))
    assert not byte_activations(gm).modified


def test_a_float_network_is_left_as_it_is():
    program = torch.export.export(
        make(TinyUNet), (torch.randn(2, 1, 8, 8), torch.tensor([1, 2])), strict=False
    )
    gm = program.module()
    for run in (rescale_temporal, byte_activations, integer_weights):
        assert not run(gm).modified
    assert any(weight_argument(n) is not None for n in gm.graph.nodes)
