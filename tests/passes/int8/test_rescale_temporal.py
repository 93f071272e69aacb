"""One row of qparams per step becomes one scale: on graphs small enough to read."""

import pytest
import torch
from torch import nn

from benchmarks.networks.small import TinyUNet, make
from tests.helpers.int8_passes import LINEAR, Keyed, T, graph_of, operators, ops
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import weight_argument
from tfmq_fx.passes import byte_activations, integer_weights, rescale_temporal
from tfmq_fx.passes.int8.rescale_temporal import PRECISE

# Rescaling moves the zero point into the rounding and reorders the sum: some float32 steps of the largest output.
CLOSE = 1e-5
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


def test_a_float_network_is_left_as_it_is():
    program = torch.export.export(
        make(TinyUNet), (torch.randn(2, 1, 8, 8), torch.tensor([1, 2])), strict=False
    )
    gm = program.module()
    for run in (rescale_temporal, byte_activations, integer_weights):
        assert not run(gm).modified
    assert any(weight_argument(n) is not None for n in gm.graph.nodes)
