"""Layers on the int8 kernels for GPUs, with the operators' reference implementations."""

import pytest
import torch
from torch import nn

from tests.helpers.agreement import CLOSE, moved
from tests.helpers.int8_passes import Float, Weighted, exported_batch, operators, pair
from tfmq_fx.graph.nodes import attribute
from tfmq_fx.passes import cuda_kernels
from tfmq_fx.passes.int8.kernels import FALLBACK, GPU_KERNELS, LAYER, arguments_of


class Layers(nn.Module):
    """A convolution and a linear that read quantized x."""

    def __init__(self, bits=4):
        super().__init__()
        self.conv = Weighted(nn.Conv2d(5, 7, 3, stride=2, padding=1), bits)
        self.linear = Weighted(nn.Linear(7, 6, bias=False), bits)

    def forward(self, *x):
        y = self.conv(pair(x[0])).flatten(2).transpose(1, 2)
        return self.linear(pair(torch.sin(y), 0.01, 128))


@torch.no_grad()
@pytest.mark.parametrize("pack", [None, "int4"])
def test_layers_become_kernels_with_the_same_values(pack):
    gm = exported_batch(Layers(), torch.randn(2, 5, 8, 8))
    inputs = [torch.randn(n, 5, 8, 8) for n in (1, 3)]
    expected = [gm(x) for x in inputs]
    assert cuda_kernels(gm, pack=pack).modified
    assert operators(gm) == [
        "quantize_per_tensor", "int8_conv2d", "flatten", "transpose", "sin", "quantize_per_tensor", "int8_linear",
    ]  # fmt: skip
    kernels = [n for n in gm.graph.nodes if n.target in GPU_KERNELS]
    assert [n.meta[LAYER] for n in kernels] == [("conv2d",), ("linear",)]
    # 120 - 128 = -8: the convolution corrects for it, the linear has nothing to correct.
    assert arguments_of(kernels[0])["x_zero_point"] == -8
    assert [arguments_of(n)["correction"] is None for n in kernels] == [False, True]
    shapes = [attribute(gm, arguments_of(n)["weight"].target) for n in kernels]
    assert [(tuple(w.shape), w.dtype) for w in shapes] == (
        [((7, 3, 3, 16), torch.int8), ((6, 16), torch.int8)]
        if pack is None
        else [((7, 3, 3, 16), torch.uint8), ((6, 16), torch.uint8)]  # 32 channels, two to a byte
    )
    for x, y in zip(inputs, expected, strict=True):
        assert moved(gm(x), y)[1] <= CLOSE
    assert not cuda_kernels(gm, pack=pack).modified


@torch.no_grad()
def test_packed_weights_give_the_same_bits_and_eight_bits_are_not_packed():
    x = torch.randn(3, 5, 8, 8)
    found = []
    for pack in (None, "int4"):
        torch.manual_seed(1)
        gm = exported_batch(Layers(), torch.randn(2, 5, 8, 8))
        cuda_kernels(gm, pack=pack)
        found.append(gm(x))
    assert torch.equal(*found)
    gm = exported_batch(Layers(8), torch.randn(2, 5, 8, 8))
    cuda_kernels(gm, pack="int4")
    assert {arguments_of(n)["weight_zero"] for n in gm.graph.nodes if n.target in GPU_KERNELS} == {None}


def quantized(layer):
    weighted = Weighted(layer)
    return nn.Sequential(Pair(), weighted)


class Pair(nn.Module):
    def forward(self, x):
        return pair(x)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (quantized(nn.Conv2d(4, 4, 3, groups=2)), (2, 4, 6, 6), "it has 2 groups: the GPU's int8 kernels take one"),
        (quantized(nn.Conv1d(4, 4, 3)), (2, 4, 6), "it is conv1d: the GPU's int8 kernels are conv2d and linear"),
        (quantized(nn.Linear(70_000, 2)), (2, 70_000), "its sums of 70000 products may exceed 32 bits"),
        (Weighted(nn.Linear(4, 2)), (2, 4), "its input has no constant scale"),
        (nn.Sequential(Pair(), nn.Linear(4, 2)), (2, 4), "its weight has scales per group"),
    ],
)  # fmt: skip
def test_layers_that_no_kernel_takes_stay_and_say_why(layer, shape, words):
    gm = exported_batch(Float(layer), torch.randn(shape))
    before = operators(gm)
    assert not cuda_kernels(gm).modified
    assert operators(gm) == before
    (found,) = [n.meta[FALLBACK] for n in gm.graph.nodes if FALLBACK in n.meta]
    assert found.startswith(words)
