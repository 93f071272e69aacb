"""Weights: nearest, learned, per channel and per group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.range_search import simple_search
from tfmq_fx.base.arithmetic import IntegerRange, choose_qparams
from tfmq_fx.observers import PerChannelWeightFakeQuantize


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(2, 9),
    st.integers(2, 8),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_groups_are_rows_of_their_own(channels, groups, kernel, size, bits, transposed, seed):
    """Each group against the slice of the weight quantized alone."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(channels, groups * size, kernel, generator=g)  # (C_out, C_in, kernel)
    given_ = w.transpose(0, 1).contiguous() if transposed else w
    observer = PerChannelWeightFakeQuantize(bits=bits, ch_axis=int(transposed), group_size=size)
    observer.initialise(given_)
    back = observer.dequantized()
    assert back.shape == given_.shape
    assert observer.q.shape == given_.shape
    flat = (back.transpose(0, 1) if transposed else back).flatten(1)
    integers = IntegerRange.weight(bits)
    for c in range(channels):
        for i in range(groups * kernel):
            x = w.flatten(1)[c, i * size : (i + 1) * size]
            scale, zero_point = choose_qparams(*simple_search(x[None], integers), integers)
            row = c * groups * kernel + i
            assert (observer.scale[row], observer.zero_point[row]) == (scale[0], zero_point[0])
            q = (torch.round(x * (1 / scale)) + zero_point).clamp(integers.quant_min, integers.quant_max)
            assert torch.equal(flat[c, i * size : (i + 1) * size], (q - zero_point) * scale)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_group_is_the_channel(axis, bits):
    w = torch.randn(6, 8, 3, 3)
    columns = w.numel() // w.shape[axis]
    both = [
        PerChannelWeightFakeQuantize(bits=bits, ch_axis=axis, group_size=size) for size in (None, columns)
    ]
    for observer in both:
        observer.initialise(w)

    def same():
        assert torch.equal(both[0].q, both[1].q)
        assert torch.equal(both[0].scale, both[1].scale)
        assert torch.equal(both[0](w), both[1](w))

    same()
    for observer in both:
        observer.start_learning(w + 0.01)
    same()
    for observer in both:
        observer.stop_learning()
    same()


def test_the_error_falls_as_the_groups_shrink():
    w = torch.randn(32, 512) * torch.rand(1, 512).mul(3).exp()  # columns of different size, as trained ones
    errors = []
    for size in (None, 256, 128, 64, 32, 16):
        observer = PerChannelWeightFakeQuantize(bits=4, ch_axis=0, group_size=size)
        observer.initialise(w)
        errors.append(float((observer.dequantized() - w).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_learning_with_groups_starts_at_the_float_weight(axis):
    w = torch.randn(6, 8, 3)
    observer = PerChannelWeightFakeQuantize(bits=4, ch_axis=axis, group_size=6)
    observer.initialise(w)
    nearest = observer.q
    alpha = observer.start_learning(w)
    inside = (nearest > 0) & (nearest < 15)
    assert torch.allclose(observer(w)[inside], w[inside], atol=2e-4)
    soft, _ = observer.soften()
    soft.sum().backward()
    assert alpha.grad.abs().sum() > 0
    observer.stop_learning()
    assert (observer.q.int() - nearest.int()).abs().max() <= 1
    assert torch.equal(observer(w), observer.dequantized())


def test_learning_starts_at_the_float_weight_and_bakes_integers_in_range():
    weight = torch.randn(5, 7)
    observer = PerChannelWeightFakeQuantize(bits=4, ch_axis=0)
    observer.initialise(weight)
    nearest = observer.q
    observer.start_learning(weight)
    inside = (nearest > 0) & (nearest < 15)
    assert torch.allclose(observer(weight)[inside], weight[inside], atol=2e-4)
    observer.stop_learning()
    assert (observer.q.int() - nearest.int()).abs().max() <= 1
    assert observer.q.max() <= 15
    assert torch.equal(observer(weight), observer.dequantized())
