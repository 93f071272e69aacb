"""Group norms by moments of each channel: the same values, and no picture viewed as groups."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.int8_passes import exported_batch, operators
from tfmq_fx.passes import norms_by_channel


class Called(nn.Module):
    """Takes what `exported_batch` gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner(*inputs)


def exported(module, *inputs):
    return exported_batch(Called(module), *inputs)


class Onnx(nn.Module):
    """A group norm as ONNX writes it, with a weight and a bias for each group."""

    def __init__(self, groups):
        super().__init__()
        self.groups, self.weight, self.bias = (
            groups,
            nn.Parameter(torch.randn(groups)),
            nn.Parameter(torch.randn(groups)),
        )

    def forward(self, x):
        y = F.instance_norm(x.view(x.shape[0], self.groups, -1), weight=self.weight, bias=self.bias, eps=1e-3)
        return y.view(x.shape) * 2


class Native(nn.Module):
    """What tracing makes of a group norm."""

    def forward(self, x):
        n, c, h, w = x.shape
        return torch.ops.aten.native_group_norm(x, torch.arange(c) / c, None, n, c, h * w, 2, 1e-4)[0]


def drawn(module):
    for p in module.parameters():
        nn.init.normal_(p)
    return module


PICTURE = (3, 8, 5, 7)
NORMS = {
    "groups": (drawn(nn.GroupNorm(4, 8)), PICTURE),
    "one group, no weights": (nn.GroupNorm(1, 8, affine=False, eps=1e-2), PICTURE),
    "a group for each channel": (drawn(nn.GroupNorm(8, 8)), PICTURE),
    "sequence": (drawn(nn.GroupNorm(2, 8)), (3, 8, 9)),
    "volume": (drawn(nn.GroupNorm(2, 8)), (3, 8, 2, 5, 3)),
    "instance norm": (drawn(nn.InstanceNorm2d(8, affine=True)), PICTURE),
    "onnx": (Onnx(4), PICTURE),
    "onnx, a group for each channel": (Onnx(8), PICTURE),
    "native": (Native(), PICTURE),
}


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_it_gives_the_same_values(name):
    norm, shape = NORMS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 50  # a mean that cancels
    gm = exported(norm.eval(), x[:2])
    expected = gm(x)
    assert norms_by_channel(gm).modified
    assert not any("norm" in op for op in operators(gm))
    torch.testing.assert_close(gm(x), expected, rtol=1e-4, atol=1e-4)
    assert not norms_by_channel(gm).modified


@torch.no_grad()
def test_the_operators():
    gm = exported(NORMS["groups"][0].eval(), torch.randn(2, *PICTURE[1:]))
    norms_by_channel(gm)
    mean = ["mean", "view", "mean", "view", "expand", "clone", "view"]
    expected = [*mean, "sub", "mul", *mean, "add", "rsqrt", "view", "mul", "mul", "view", "add"]
    assert sorted(operators(gm)) == sorted(expected)


@torch.no_grad()
def test_half_precision_is_computed_in_float32():
    norm, x = drawn(nn.GroupNorm(2, 8)).bfloat16().eval(), torch.randn(3, 8, 6, 6).bfloat16() + 20
    gm = exported(norm, x[:2])
    expected = gm(x)
    norms_by_channel(gm)
    assert gm(x).dtype == torch.bfloat16
    torch.testing.assert_close(gm(x), expected, rtol=0, atol=2**-6)  # a bfloat16 step of the largest values


class Running(nn.Module):
    def forward(self, x):
        mean, variance = torch.zeros(8), torch.ones(8)
        return F.instance_norm(x, mean, variance, use_input_stats=False)


class Rows(nn.Module):
    def forward(self, x):
        return F.group_norm(x, 2)


@pytest.mark.parametrize(
    ("network", "shape"), [(Running(), PICTURE), (Rows(), (3, 8))], ids=["other moments", "no picture"]
)
@torch.no_grad()
def test_what_is_left_alone(network, shape):
    gm = exported(network, torch.randn(shape))
    assert not norms_by_channel(gm).modified
