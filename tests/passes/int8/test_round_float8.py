"""Casts to float8 and back as arithmetic, with the casts' own values."""

import torch

from tests.helpers.float8_numbers import values
from tests.helpers.int8_passes import exported_batch, operators
from tfmq_fx.base import float8
from tfmq_fx.passes import convert, round_float8
from tfmq_fx.passes.pass_manager import check_order


class Rounded(torch.nn.Module):
    def forward(self, *x):
        return float8.dequantize(float8.quantize(x[0], 1.0), 1.0)


@torch.no_grad()
def test_it_gives_the_same_numbers():
    x = torch.cat([values(), torch.tensor([1e9, -1e9, 0.0])])
    gm = exported_batch(Rounded(), x[:2])
    expected = gm(x)
    assert round_float8(gm).modified
    assert operators(gm) == [
        *("_assert_tensor_metadata", "to", "mul", "clamp", "_assert_tensor_metadata", "to", "_assert_tensor_metadata"),
        *("abs", "clamp", "log2", "floor", "sub", "pow", "div", "round", "mul", "mul"),
    ]  # fmt: skip
    assert torch.equal(gm(x), expected)
    assert not round_float8(gm).modified


def test_it_comes_after_convert():
    assert check_order([round_float8, convert], done=["calibrate"]) == [
        "convert must come before round_float8"
    ]
