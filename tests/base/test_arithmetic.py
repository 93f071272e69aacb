import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.helpers.range_search import simple_search
from tfmq_fx.base.arithmetic import (
    IntegerRange,
    check_bits,
    choose_qparams,
    choose_shared_qparams,
    dequantize_rows,
    fake_quantize_rows,
    fake_quantize_tokens,
    fitting_group_size,
    pack_bits,
    quantize_rows,
    quantize_tokens,
    search_range,
    unpack_bits,
)
from tfmq_fx.base.errors import TFMQError

BITS = st.integers(2, 8)
ROWS = hnp.arrays("float32", (3, 7), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False))


@given(ROWS, BITS, st.booleans())
def test_qparams_are_finite_and_in_range(x, bits, weight):
    integers = IntegerRange.weight(bits) if weight else IntegerRange.activation(bits)
    rows = torch.from_numpy(x)
    scale, zero_point = choose_qparams(rows.amin(1), rows.amax(1), integers)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert ((zero_point >= integers.quant_min) & (zero_point <= integers.quant_max)).all()


@given(ROWS, BITS)
def test_a_shared_zero_point_covers_every_row_with_no_finer_scale_than_its_own(x, bits):
    integers, rows = IntegerRange.activation(bits), torch.from_numpy(x)
    low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    scale, zero_point = choose_shared_qparams(low, high, integers)
    assert len(zero_point.unique()) == 1
    assert 0 <= zero_point[0] <= integers.quant_max
    assert (scale > 0).all()
    slack = 1e-5 * scale * integers.quant_max
    assert ((0 - zero_point) * scale <= low + slack).all()
    assert ((integers.quant_max - zero_point) * scale >= high - slack).all()
    own, _ = choose_qparams(low, high, integers)
    assert (scale >= own * (1 - 1e-5)).all()
    # Rows that are multiples of one another lose what rounding the zero point costs, and no more.
    both = low[:1] * torch.tensor([1.0, 2.0, 4.0]), high[:1] * torch.tensor([1.0, 2.0, 4.0])
    scale, zero_point = choose_shared_qparams(*both, integers)
    own, _ = choose_qparams(*both, integers)
    assert (scale <= 2 * own).all()


@pytest.mark.parametrize("row", [[0.0, 0.0], [3.0, 3.0], [-3.0, -3.0], [1.0, 2.0], [-2.0, -1.0]])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_one_signed_and_constant_rows_survive(row, bits):
    integers = IntegerRange.weight(bits)
    x = torch.tensor([row])
    scale, zero_point = choose_qparams(*search_range(x, integers), integers)
    y = dequantize_rows(quantize_rows(x, scale, zero_point, integers), scale, zero_point, integers)
    assert torch.isfinite(y).all()
    # Half a step of a range that was extended to zero, and shrunk by the search to no less than 0.2 of it.
    assert (y - x).abs().max() <= x.abs().max() * 0.5


@given(ROWS, BITS)
def test_quantizing_twice_changes_nothing(x, bits):
    integers = IntegerRange.weight(bits)
    rows = torch.from_numpy(x)
    scale, zero_point = choose_qparams(rows.amin(1), rows.amax(1), integers)
    q = quantize_rows(rows, scale, zero_point, integers)
    again = quantize_rows(dequantize_rows(q, scale, zero_point, integers), scale, zero_point, integers)
    assert torch.equal(q, again)


@given(st.integers(0, 200), BITS, st.integers(0, 2**32 - 1))
def test_packing_round_trips_at_its_size(numel, bits, seed):
    integers = IntegerRange.weight(bits)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(integers.quant_min, integers.quant_max + 1, (numel,), generator=generator).to(
        integers.dtype
    )
    packed = pack_bits(q, integers)
    places = (q.int()[:, None] - integers.quant_min >> torch.arange(bits)) & 1
    assert packed.tolist() == np.packbits(places.numpy().astype(np.uint8), bitorder="little").tolist()
    assert torch.equal(unpack_bits(packed, (numel,), integers), q)
    wide = dataclasses.replace(integers, dtype=torch.int32)  # as zero points are
    assert torch.equal(pack_bits(q.int(), wide), packed)
    assert torch.equal(unpack_bits(packed, (numel,), wide), q.int())


def test_a_stream_of_the_wrong_length_is_refused():
    with pytest.raises(TFMQError, match="takes 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), (4,), IntegerRange.weight(4))


@settings(max_examples=20)
@given(ROWS, BITS)
def test_the_search_is_never_worse_than_the_full_range(x, bits):
    integers, rows = IntegerRange.weight(bits), torch.from_numpy(x)

    def error(low, high):
        scale, zero_point = choose_qparams(low, high, integers)
        y = dequantize_rows(quantize_rows(rows, scale, zero_point, integers), scale, zero_point, integers)
        return (y - rows).abs().pow(2.4).sum(1)

    full, found = error(rows.amin(1), rows.amax(1)), error(*search_range(rows, integers))
    assert (found <= full * (1 + 1e-4) + 1e-6).all()  # the search divides, the operator multiplies by 1/scale


def test_fake_quantize_gradient_is_one_inside_and_zero_outside():
    integers = IntegerRange.activation(8)
    x = torch.tensor([[-5.0, 0.5, 99.0]], requires_grad=True)
    y = fake_quantize_rows(x, torch.tensor([0.1]), torch.tensor([10], dtype=torch.int32), integers)
    y.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 0.0]]
    assert y[0].tolist() == pytest.approx([-1.0, 0.5, 24.5])


@pytest.mark.parametrize("bits", [0, 1, 9, 12, 17, 32, 4.0, True, "4"])
def test_unsupported_bits_are_refused(bits):
    with pytest.raises(TFMQError, match="2 to 8, or 16"):
        check_bits(bits, "weight_bits")


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([2.0, 2.4]),
    st.integers(0, 2**31),
)
def test_all_candidates_at_once_find_what_one_after_the_other_finds(rows, columns, bits, p, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for integers in (IntegerRange.weight(bits), IntegerRange.activation(bits)):
        found, expected = search_range(x, integers, p=p), simple_search(x, integers, p=p)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [0.0, 3e38, -3e38, 1e-38, torch.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_on_extreme_rows_is_the_simple_one(value, bits):
    x = torch.tensor([[0.0, value, -0.5 * value], [1.0, 2.0, 3.0]])
    if value == torch.inf:
        x[0, 2] = 1.0
    integers = IntegerRange.weight(bits)
    found, expected = search_range(x, integers), simple_search(x, integers)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("group_size", "columns", "expected"),
    [
        (32, 320, 32),
        (128, 2880, 64),  # half of it before 120, the largest divisor
        (32, 72, 24),
        (32, 36, 18),
        (32, 37, None),  # prime
        (32, 34, 17),
        (32, 62, 31),
        (32, 58, 29),
        (7, 12, 6),
        (7, 10, 5),
        (2, 3, None),
        (64, 64, None),  # the row is one group
        (64, 27, None),
    ],
)
def test_the_group_size_that_fits(group_size, columns, expected):
    assert fitting_group_size(group_size, columns) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(2, 8), st.integers(0, 2**31))
def test_tokens_against_plain_arithmetic(shape, bits, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    high = 2 ** (bits - 1) - 1
    y = quantize_tokens(x, IntegerRange.token(bits)).reshape(-1, shape[-1])
    for row, got in zip(x.reshape(-1, shape[-1]), y, strict=True):
        scale = row.abs().max() / high
        assert torch.equal(got, (row * (1 / scale)).round().clamp(-high, high) * scale)
        assert ((got - row).abs() <= scale * 0.50001).all()


def test_tokens_of_zeros_and_outliers_do_not_touch_the_others():
    x = torch.randn(3, 4, 8)
    x[0, 1], x[1, 2] = 0, x[1, 2] * 1e4
    y = quantize_tokens(x, IntegerRange.token(8))
    assert torch.equal(y[0, 1], torch.zeros(8))
    assert torch.equal(y[2], quantize_tokens(x[2], IntegerRange.token(8)))
    assert ((y - x).abs().amax(2) <= x.abs().amax(2) / 253).all()


def test_the_gradient_goes_straight_through():
    x = torch.randn(2, 3, 8, requires_grad=True)
    grad = torch.randn(2, 3, 8)
    fake_quantize_tokens(x, IntegerRange.token(4)).backward(grad)
    assert torch.equal(x.grad, grad)
