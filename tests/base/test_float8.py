"""Rounding to float8_e4m3fn, against torch's cast and against the list of all its numbers."""

import pytest
import torch

from tests.helpers.float8_numbers import ALL, NUMBERS, values
from tfmq_fx.base import float8
from tfmq_fx.base.arithmetic import (
    IntegerRange,
    choose_qparams,
    choose_shared_qparams,
    fake_quantize_rows,
    quantize_tokens,
    search_range,
)


def test_there_are_so_many_numbers_and_integers_of_four_bits_are_among_them():
    assert len(ALL) == 2 * 126 + 1
    assert (ALL.min(), ALL.max()) == (NUMBERS.quant_min, NUMBERS.quant_max)
    whole = set(ALL.tolist())
    assert set(range(-16, 17)) <= whole
    assert 17 not in whole


def test_it_rounds_as_torch_casts_ties_to_even():
    x = values()
    assert torch.equal(NUMBERS.nearest(x), x.to(float8.DTYPE).float())


def test_the_spacing_is_the_distance_between_the_neighbours():
    x = values(torch.float64)
    x = x[~torch.isin(x, ALL)]
    above = torch.searchsorted(ALL, x)
    assert torch.equal(NUMBERS.spacing(x), ALL[above] - ALL[above - 1])
    assert torch.equal(NUMBERS.spacing(torch.tensor([0.0, 1e9])), torch.tensor([2.0**-9, 32.0]))


def test_float64_is_rounded_once():
    x = torch.tensor([17 + 1e-12], dtype=torch.float64)  # float32 would make it a tie, 17, and that 16
    assert NUMBERS.nearest(x) == 18


def test_what_is_beyond_the_range_is_clipped_and_nan_stays():
    x = torch.tensor([1e30, -torch.inf, torch.inf, 460.0, torch.nan])
    q = float8.quantize(x, 1.0).float()
    assert q[:4].tolist() == [448, -448, 448, 448]
    assert q[4].isnan()


@pytest.mark.parametrize("scale", [0.3, 1e-6, 7.0])
def test_a_scale_as_a_number_and_as_a_tensor_give_the_same_bits(scale):
    x, scale = values() * scale, torch.tensor(scale)
    assert torch.equal(float8.quantize(x, float(scale)).float(), float8.quantize(x, scale).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_relative_error_is_at_most_a_sixteenth(dtype):
    x = torch.randn(3, 1000).to(dtype)
    scale, zero_point = choose_qparams(x.amin(1), x.amax(1), NUMBERS)
    assert torch.equal(scale, x.float().abs().amax(1) / 448)
    y = fake_quantize_rows(x, scale, zero_point, NUMBERS)
    big = x.abs() > scale[:, None] / 64
    allowed = x.float().abs() / (16 if dtype == torch.float32 else 15)  # bfloat16 rounds the result
    assert ((y - x).float().abs() <= allowed)[big].all()
    assert y.dtype is dtype


def test_rows_of_zeros_have_a_finite_scale():
    zeros = torch.zeros(2)
    for choose in (choose_qparams, choose_shared_qparams):
        scale, zero_point = choose(zeros, zeros, NUMBERS)
        y = fake_quantize_rows(torch.tensor([[0.0, 1.0], [-3.0, 0.0]]), scale, zero_point, NUMBERS)
        assert scale.isfinite().all()
        assert y.abs().max() < 1e-30
    assert torch.equal(quantize_tokens(torch.zeros(2, 3), NUMBERS), torch.zeros(2, 3))


def test_gradients_pass_within_the_range_alone():
    x = torch.tensor([[1.0, 500.0, -470.0]], requires_grad=True)
    fake_quantize_rows(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), NUMBERS).sum().backward()
    assert x.grad.tolist() == [[1, 0, 0]]


def test_the_range_of_least_error_is_searched_on_the_same_numbers():
    """All but one value are numbers of a quarter of the range: that quarter is exact."""
    x = torch.cat([ALL.float() / 4, torch.tensor([300.0])])[None]
    weight = torch.ones(x.shape[1])
    weight[-1] = 0.0
    low, high = search_range(x, NUMBERS, p=2.0, weight_K=weight)
    scale, zero_point = choose_qparams(low, high, NUMBERS)
    y = fake_quantize_rows(x, scale, zero_point, NUMBERS)
    plain = fake_quantize_rows(x, *choose_qparams(x.amin(1), x.amax(1), NUMBERS), NUMBERS)
    assert (y - x)[0, :-1].square().sum() < 0.8 * (plain - x)[0, :-1].square().sum()


def test_integers_are_rounded_as_before():
    x = torch.tensor([0.5, 1.5, -2.5])
    assert IntegerRange.weight(8).nearest(x).tolist() == [0, 2, -2]
    assert IntegerRange.weight(8).spacing(x) == 1.0
