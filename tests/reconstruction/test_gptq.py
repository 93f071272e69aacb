"""GPTQ against brute force and closed forms, and unfolded convolutions against convolutions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tfmq_fx.base.arithmetic import IntegerRange, choose_qparams, search_range
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.reconstruction.gptq import (
    Moments,
    column_pieces,
    corrected,
    gptq,
    joined,
    parted,
    rows,
    supported,
)

INT4 = IntegerRange.weight(4)


def layer_of(module, x):
    gm = torch.export.export(module, (x,), strict=False).module()
    return next(n for n in gm.graph.nodes if n.op == "call_function" and supported(n))


LAYERS = [
    (nn.Linear(6, 4), (3, 6)),
    (nn.Linear(6, 4), (3, 5, 6)),
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(2, 1)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 7, 5)),
    (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 7, 5)),
    (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 5, 3)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS)
def test_rows_times_weights_is_the_layer(module, shape):
    x, weight = torch.randn(shape), module.weight.detach()
    with torch.no_grad():
        expected = module(x) - (module(torch.zeros_like(x)))  # without the bias
        node = layer_of(module, x)
        r = rows(node, x, weight)
        groups = r.shape[0]
        y = r @ weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)  # G, R, C
    if isinstance(module, nn.Linear):
        got = y[0].reshape(expected.shape)
    else:
        got = torch.cat(list(y), dim=1).reshape(x.shape[0], *expected.shape[2:], -1).movedim(-1, 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("module", "shape"), LAYERS)
def test_drawn_positions_are_rows_of_the_whole_the_same_in_each_sample(module, shape):
    x, weight = torch.randn(shape), module.weight.detach()
    node = layer_of(module, x)
    whole = rows(node, x, weight)
    whole = whole.unflatten(1, (len(x), -1))  # groups, samples, positions, columns
    some = rows(node, x, weight, 4).unflatten(1, (len(x), -1))
    kept = min(4, whole.shape[2])
    assert some.shape[2] == kept
    found = (some[0, 0][:, None] == whole[0, 0]).all(-1)
    assert found.sum() == kept  # each is one of them
    assert torch.equal(some, whole[:, :, found.any(0)])


def problem(seed, channels=6, columns=10, count=40):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(channels, columns, generator=g)
    mix = torch.randn(columns, columns, generator=g)
    x = (
        torch.randn(1, count, columns, generator=g) @ mix
    )  # correlated inputs: there is something to make up for
    scale, zero_point = choose_qparams(*search_range(w, INT4), INT4)
    return w[None], x, scale[None, :, None], zero_point[None, :, None]


def with_hessian(h):
    moments = Moments(1, len(h))
    moments.h_GKK[0] = h
    return moments


def loss(w, q, x, scale, zero_point):
    error = w.double() - (q.double() - zero_point) * scale.double()
    return float((error @ x.double().transpose(1, 2)).square().sum())


def nearest(w, scale, zero_point):
    return (torch.round(w.double() / scale.double()) + zero_point).clamp(0, 15)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_its_integers_are_integers_of_the_range(seed):
    w, x, scale, zero_point = problem(seed)
    moments = Moments(1, 10)
    moments.add(x)
    q = gptq(w, moments, scale, zero_point, INT4)
    assert ((q >= 0) & (q <= 15)).all()
    assert torch.equal(q, q.round())
    assert q.is_contiguous()  # as after an interruption, when it comes from a file


def test_it_beats_rounding_to_nearest_on_correlated_inputs():
    """Greedy, so not on each (clipped columns cannot make up for others), but by far on the whole."""
    ratios = []
    for seed in range(40):
        w, x, scale, zero_point = problem(seed)
        moments = Moments(1, 10)
        moments.add(x)
        ours, theirs = gptq(w, moments, scale, zero_point, INT4), nearest(w, scale, zero_point)
        ratios.append(loss(w, ours, x, scale, zero_point) / loss(w, theirs, x, scale, zero_point))
    ratios = torch.tensor(ratios)
    assert ratios.log().mean().exp() < 0.65  # 0.52 measured
    assert (ratios < 1).float().mean() > 0.9


def test_uncorrelated_inputs_are_rounded_to_nearest():
    w, _, scale, zero_point = problem(0)
    q = gptq(w, with_hessian(torch.eye(10) * 3), scale, zero_point, INT4)
    assert torch.equal(q, nearest(w, scale, zero_point))


def test_two_columns_match_the_best_of_all_roundings_given_the_first():
    """With two columns GPTQ rounds the first to nearest, then the second optimally: checked by brute force."""
    w, x, scale, zero_point = problem(3, channels=4, columns=2)
    moments = Moments(1, 2)
    moments.add(x)
    q = gptq(w, moments, scale, zero_point, INT4, damping=0.0)
    first = int(moments.h_GKK[0].diagonal().argmax())
    for c in range(4):
        best = min(
            itertools.product(range(16), repeat=2),
            key=lambda pair: (
                pair[first] != nearest(w, scale, zero_point)[0, c, first],
                loss(
                    w[:, c : c + 1], torch.tensor([[pair]]), x, scale[:, c : c + 1], zero_point[:, c : c + 1]
                ),
            ),
        )
        assert tuple(q[0, c].int().tolist()) == best


def test_dead_inputs_and_few_rows():
    w, x, scale, zero_point = problem(1, count=3)  # rank 3 of 10
    x[:, :, 4] = 0
    moments = Moments(1, 10)
    moments.add(x)
    q = gptq(w, moments, scale, zero_point, INT4)
    assert torch.isfinite(q).all()
    assert torch.equal(q[:, :, 4], nearest(w, scale, zero_point)[:, :, 4])
    zero = gptq(w, with_hessian(torch.zeros(10, 10)), scale, zero_point, INT4)
    assert torch.equal(zero, nearest(w, scale, zero_point))


def test_inputs_that_are_not_finite_are_refused():
    w, _, scale, zero_point = problem(1)
    with pytest.raises(TFMQError, match="NaN or infinite"):
        gptq(w, with_hessian(torch.full((10, 10), torch.nan)), scale, zero_point, INT4)


def test_groups_are_independent():
    problems = [problem(seed) for seed in (1, 2)]
    both = [torch.cat(parts) for parts in zip(*problems, strict=True)]
    together = Moments(2, 10)
    together.add(both[1])
    q = gptq(both[0], together, both[2], both[3], INT4)
    for i, (w, x, scale, zero_point) in enumerate(problems):
        alone = Moments(1, 10)
        alone.add(x)
        assert torch.equal(q[i : i + 1], gptq(w, alone, scale, zero_point, INT4))


def test_the_corrected_weight_is_the_least_squares_one():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(1, 5, 8, generator=g), torch.randn(1, 60, 8, generator=g)
    seen = (x * 4).round() / 4 + 0.1
    moments = Moments(1, 8)
    for part in (slice(0, 25), slice(25, 60)):
        moments.add(seen[:, part], x[:, part])
    best = torch.linalg.lstsq(seen[0].double(), (x[0] @ w[0].T).double()).solution.T
    torch.testing.assert_close(corrected(w, moments, damping=0.0)[0], best.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(corrected(w, moments, damping=1e9)[0], w[0], rtol=1e-4, atol=1e-5)


def test_linear_of_quantized_inputs_is_nearer_after_correction():
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(1, 5, 8, generator=g), torch.randn(1, 60, 8, generator=g)
    seen = (x * 2).round() / 2
    moments = Moments(1, 8)
    moments.add(seen, x)
    v = corrected(w, moments, damping=0.01).float()
    target = F.linear(x[0], w[0])
    assert (F.linear(seen[0], v[0]) - target).square().sum() < (
        F.linear(seen[0], w[0]) - target
    ).square().sum()


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_hessian_past_the_limit_is_cut_into_pieces_of_columns_each_on_its_own(blocks):
    w, x, _, _ = problem(3, columns=16)
    scale, zero_point = choose_qparams(*search_range(w[0].reshape(6 * blocks, -1), INT4), INT4)
    scale, zero_point = scale.reshape(1, 6, blocks), zero_point.reshape(1, 6, blocks)
    assert column_pieces(1, 16, blocks, 40 * 16**2) == 1
    assert column_pieces(1, 16, blocks, 40 * 16**2 - 1) == 2
    assert column_pieces(1, 16, 4, 1) == 4, "a piece holds whole blocks"
    assert torch.equal(joined(parted(x, 2), 2), x)
    halves = Moments(2, 8, pieces=2)
    halves.add(parted(x, 2))
    spread = [s.expand(-1, -1, max(blocks, 2)) for s in (scale, zero_point)]
    q = joined(gptq(parted(w, 2), halves, *[parted(s, 2) for s in spread], INT4), 2)
    for i in range(2):
        alone, columns = Moments(1, 8), slice(8 * i, 8 * i + 8)
        alone.add(x[:, :, columns])
        own = slice(0, 1) if blocks == 1 else slice(2 * i, 2 * i + 2)
        expected = gptq(w[:, :, columns], alone, scale[:, :, own], zero_point[:, :, own], INT4)
        assert torch.equal(q[:, :, columns], expected)


def plain_gptq(w, h, scale, zero_point, low, high):
    """One layer, one column after the other by falling diagonal, the inverse of what is left computed anew each time."""
    w, q = w.double().clone(), torch.empty_like(w)
    left = h.diagonal().argsort(descending=True, stable=True)
    while len(left):
        k, inverse = left[0], torch.linalg.inv(h[left][:, left])
        s, z = scale[:, k].double(), zero_point[:, k]
        q[:, k] = (torch.round(w[:, k] / s) + z).clamp(low, high).float()
        error = (w[:, k] - (q[:, k] - z) * s) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return q


@pytest.mark.parametrize("layer_groups", [1, 2])
def test_second_order_takes_each_columns_own_scale(layer_groups):
    integers = IntegerRange.weight(4)
    w = torch.randn(layer_groups, 5, 12)
    x = torch.randn(layer_groups, 60, 12) @ torch.randn(12, 12)
    moments = Moments(layer_groups, 12)
    moments.add(x)
    scale, zero_point = choose_qparams(*search_range(w.reshape(-1, 4), integers), integers)
    scale, zero_point = (v.reshape(layer_groups, 5, 3) for v in (scale, zero_point))
    q = gptq(w, moments, scale, zero_point, integers, damping=0.0)
    for i in range(layer_groups):
        columns = [v[i].repeat_interleave(4, dim=1) for v in (scale, zero_point)]
        assert torch.equal(q[i], plain_gptq(w[i], moments.h_GKK[i], *columns, 0, 15).double())
    # Groups that happen to be equal are no groups.
    one = gptq(w, moments, scale[..., :1], zero_point[..., :1], integers)
    three = [v[..., :1].expand(-1, -1, 3) for v in (scale, zero_point)]
    assert torch.equal(one, gptq(w, moments, *three, integers))
