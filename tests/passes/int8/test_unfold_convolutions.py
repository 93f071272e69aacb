"""Convolutions as matrix products of what they see."""

import pytest
import torch

from benchmarks.networks.small import TinyUNet
from tests.helpers.int8_passes import assert_the_values_stay, graph
from tfmq_fx.passes import unfold_convolutions
from tfmq_fx.passes.int8.unfold_convolutions import _places


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [([9], [3], [2], [1], [2]), ([9, 8], [3, 2], [2, 1], [0, 2], [2, 3]), ([4, 5, 6], [2, 3, 1], [1, 2, 2], [1, 0, 1], [1, 2, 1])],
)  # fmt: skip
def test_patches_are_what_a_convolution_sees(size, kernel, stride, padding, dilation):
    n = len(size)
    convolution = getattr(torch.nn.functional, f"conv{n}d")
    x, w = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    expected = convolution(x, w, None, stride, padding, dilation)
    padded = torch.nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
    index = _places(list(padded.shape[2:]), kernel, stride, dilation)
    rows = padded.movedim(1, -1).reshape(2, -1, 3).index_select(1, index)
    rows = rows.reshape(2, *expected.shape[2:], -1)
    got = torch.nn.functional.linear(rows, w.flatten(2).movedim(1, 2).flatten(1)).movedim(-1, 1)
    torch.testing.assert_close(got, expected)


def test_the_values_stay():
    before = {"aten.conv2d.default": 8, "aten.linear.default": 6}
    after = {"aten.conv2d.default": 2, "aten.linear.default": 12}
    assert_the_values_stay(graph(TinyUNet), unfold_convolutions, before, after)
