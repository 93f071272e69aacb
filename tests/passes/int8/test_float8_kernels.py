"""Linears on the float8 kernels for GPUs, with the operator's reference implementation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.agreement import CLOSE, moved
from tests.helpers.int8_passes import Float, Weighted, exported_batch, operators
from tests.helpers.int8_passes import pair as byte_pair
from tfmq_fx.base import float8
from tfmq_fx.base.float8_kernels import LEAST
from tfmq_fx.graph.nodes import attribute
from tfmq_fx.passes import bfloat16_glue, cuda_kernels, float8_kernels, share_quantized
from tfmq_fx.passes.int8.fold_weights import fold_weights
from tfmq_fx.passes.int8.kernels import FALLBACK, FLOAT8_KERNEL, LAYER, arguments_of
from tfmq_fx.runtimes.torch_engine import dtypes_of


def pair(x, scale=0.02):
    return float8.dequantize(float8.quantize(x, scale), scale)


class Weighted8(nn.Module):
    """A linear with a weight of float8, one scale per output channel or per `group` columns."""

    def __init__(self, layer, group=None):
        super().__init__()
        rows = layer.weight.detach().reshape(-1, group or layer.in_features)
        self.scale = nn.Buffer(rows.abs().amax(1) / 448)
        self.q = nn.Buffer(float8.quantize(rows, self.scale[:, None]))
        self.bias, self.shape = layer.bias, layer.weight.shape

    def forward(self, x):
        weight = float8.dequantize(self.q, torch.ops.aten.view.default(self.scale, [-1, 1]))
        return F.linear(x, weight if self.q.shape == self.shape else weight.reshape(self.shape), self.bias)


class Layers(nn.Module):
    """Three linears: q and k read x with one scale, and the last one what they sum to, with a scale of each sample."""

    def __init__(self):
        super().__init__()
        self.q, self.k = (Weighted8(nn.Linear(9, 20)) for _ in range(2))
        self.out = Weighted(nn.Linear(20, 16, bias=False))
        self.scales = nn.Buffer(torch.rand(5) / 10 + 0.01)

    def forward(self, *given):
        x, step = given
        y = torch.sin(self.q(pair(x)) + self.k(pair(x)))
        scale = self.scales.index_select(0, step).view(-1, 1, 1)
        return self.out(pair(y, scale))


def layers():
    torch.manual_seed(0)
    gm = exported_batch(Layers(), torch.randn(2, 3, 9), torch.tensor([0, 1]))
    for check in gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        gm.graph.erase_node(check)  # as in every flat graph
    return gm


def batches():
    return [(torch.randn(n, 3, 9), torch.arange(n) % 5) for n in (1, 6)]


@torch.no_grad()
def test_linears_become_kernels_with_the_same_values():
    gm = layers()
    expected = [(b, gm(*b)) for b in batches()]
    assert float8_kernels(gm).modified
    kernels = [n for n in gm.graph.nodes if n.target is FLOAT8_KERNEL]
    assert [n.meta[LAYER] for n in kernels] == [("linear",), ("linear_1",), ("linear_2",)]
    given = [arguments_of(n) for n in kernels]
    assert given[0]["x"] is given[1]["x"]  # x is rounded once
    assert [a["row_scale"] is None for a in given] == [True, True, False]
    assert [a["bias"] is None for a in given] == [False, False, True]
    shapes = [tuple(attribute(gm, a["weight"].target).shape) for a in given]
    assert shapes == [(32, 16), (32, 16), (16, 32)]
    assert operators(gm).count("slice") == 2  # 20 of 32 channels
    for inputs, y in expected:
        assert moved(gm(*inputs), y)[1] <= CLOSE
    assert not float8_kernels(gm).modified


@torch.no_grad()
def test_integers_of_four_bits_are_exact():
    """The sums are those of the integers: with scales of one they come back to the bit."""
    gm = exported_batch(
        Float(nn.Sequential(Rounded(1.0), Weighted(nn.Linear(16, 16, bias=False)))), torch.randn(2, 16)
    )
    layer = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    zero_point = attribute(gm, layer.args[1].args[2].target)
    attribute(gm, layer.args[1].args[1].target).fill_(1.0)
    q = attribute(gm, layer.args[1].args[0].target).long() - zero_point[:, None]
    float8_kernels(gm)
    x = torch.randint(-16, 17, (5, 16))
    assert torch.equal(gm(x.float()).long(), x @ q.T)


class Rounded(nn.Module):
    def __init__(self, scale=0.02):
        super().__init__()
        self.scale = scale

    def forward(self, *x):
        return pair(x[0], self.scale)


@torch.no_grad()
def test_between_kernels_bfloat16_and_float32_inside_the_rounding():
    gm = layers()
    x, step = batches()[1]
    expected = gm(x, step)
    float8_kernels(gm)
    bfloat16_glue(gm, dtypes=dtypes_of(gm, {"x": x, "step": step}), precise=())
    found = dtypes_of(gm, {"x": x, "step": step})
    kernels = [n for n in gm.graph.nodes if n.target is FLOAT8_KERNEL]
    assert [found[n] for n in kernels] == 3 * [torch.bfloat16]
    assert attribute(gm, kernels[0].args[4].target).dtype is torch.bfloat16
    clamps = [n for n in gm.graph.nodes if n.target is torch.ops.aten.clamp.default]
    assert {found[n] for n in clamps} == {torch.float32}
    assert found[kernels[2].args[3]] is torch.float32
    # The sine's bfloat16 moves some of its values to the next number, 1/16 of themselves: 5% of the largest output measured.
    assert moved(gm(x, step), expected)[1] <= 0.1


@pytest.mark.parametrize(
    ("layer", "shape", "capability", "words"),
    [
        (Weighted8(nn.Linear(16, 16)), (2, 16), (8, 6), "float8 kernels need compute capability 8.9, and this GPU has 8.6"),
        (Weighted8(nn.Linear(16, 16), group=8), (2, 16), LEAST, "its weight has scales per group"),
        (nn.Linear(16, 16), (2, 16), LEAST, "its weight has scales per group, or is no constant"),
        (Weighted(nn.Linear(16, 16), bits=8), (2, 16), LEAST, "its integers exceed 16: float8_e4m3fn does not hold them exactly"),
        (Weighted(nn.Conv2d(4, 4, 3)), (2, 4, 6, 6), LEAST, "it is conv2d: the GPU's float8 kernels are linears"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_layers_that_no_kernel_takes_stay_and_say_why(layer, shape, capability, words):
    gm = exported_batch(Float(nn.Sequential(Rounded(), layer)), torch.randn(shape))
    cuda_kernels(gm)  # has its own words for them
    before = operators(gm)
    assert not float8_kernels(gm, capability=capability).modified
    assert operators(gm) == before
    (found,) = [n.meta[FALLBACK] for n in gm.graph.nodes if FALLBACK in n.meta]
    assert found.startswith(words)
    fold_weights(gm)  # what then runs
    assert gm(torch.randn(shape)).isfinite().all()


def test_int8_kernels_leave_float8_alone():
    gm = exported_batch(Float(nn.Sequential(Rounded(), Weighted8(nn.Linear(16, 16)))), torch.randn(2, 16))
    assert not cuda_kernels(gm).modified
    (found,) = [n.meta[FALLBACK] for n in gm.graph.nodes if FALLBACK in n.meta]
    assert found == "it multiplies float8_e4m3fn: the GPU's kernels multiply bytes"


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Weighted(nn.Linear(16, 16)), Weighted8(nn.Linear(16, 8))

    def forward(self, *x):
        return self.second(pair(self.first(byte_pair(x[0]))))


@torch.no_grad()
def test_an_int8_kernel_before_it_keeps_its_floats():
    gm = exported_batch(Both(), torch.randn(2, 16))
    x = torch.randn(7, 16)
    expected = gm(x)
    for change in (cuda_kernels, float8_kernels, share_quantized):
        change(gm)
    assert moved(gm(x), expected)[1] <= CLOSE
