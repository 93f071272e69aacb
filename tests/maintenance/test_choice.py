"""Cached or reconstructed: within the bound and the budget, the fewer bytes."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.maintenance.choice import Option, choose, total_bytes, total_disturbance


def option(tensors, distance=0.0, effect=0.0):
    return Option(tensors=tensors, distance=distance, effect=effect)


def two(*, cache=(80, 80), effect=(1e-6, 1e-6), own=60, shared=50):
    """Two features whose reconstruction shares `shared` bytes; the table of timesteps is always there."""
    return {
        name: {
            "reconstruct": option({f"{name}.weight": own, "mlp": shared}, effect=effect[i]),
            "cache": option({f"{name}: cached": cache[i]}, distance=1e-8),
        }
        for i, name in enumerate("ab")
    }


BOTH_CACHED, BOTH_KEPT = {"a": "cache", "b": "cache"}, {"a": "reconstruct", "b": "reconstruct"}


def test_the_fewer_bytes_are_taken():
    assert choose(two(cache=(40, 70), shared=0), bound=1e-3) == {"a": "cache", "b": "reconstruct"}


def test_shared_bytes_go_when_the_last_feature_is_cached():
    """Each cache alone is larger than the layer it stands for (80 against 60); both together free the 50 that they share."""
    assert choose(two(), bound=1e-3) == BOTH_CACHED
    assert choose(two(shared=39), bound=1e-3) == BOTH_KEPT


def test_the_bound_overrules_the_bytes():
    assert choose(two(effect=(1e-2, 1e-6), shared=0), bound=1e-3) == {"a": "cache", "b": "reconstruct"}
    far = {"a": {"reconstruct": option({"w": 9}, effect=0.2), "cache": option({"c": 1}, distance=0.3)}}
    assert choose(far, bound=1e-3) == {"a": "reconstruct"}  # neither is within it: the better one


def test_a_budget_is_spent_on_the_largest_disturbance():
    options = two(effect=(1e-4, 5e-4), shared=0)
    assert choose(options, bound=1e-3) == BOTH_KEPT
    assert choose(options, bound=1e-3, budget=120) == BOTH_KEPT
    assert choose(options, bound=1e-3, budget=140) == {"a": "reconstruct", "b": "cache"}
    assert choose(options, bound=1e-3, budget=160) == BOTH_CACHED


def test_a_budget_below_the_bounds_smallest_choice_lifts_the_bound():
    options = two(effect=(1e-2, 1e-2), shared=0)
    assert choose(options, bound=1e-3) == BOTH_CACHED
    assert choose(options, bound=1e-3, budget=150) in (
        {"a": "cache", "b": "reconstruct"},
        {"a": "reconstruct", "b": "cache"},
    )
    with pytest.raises(TFMQError, match="need at least 120 bytes"):
        choose(options, bound=1e-3, budget=119)


sizes = st.integers(1, 200)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(sizes, sizes, st.floats(1e-9, 1e-2), st.booleans()), min_size=1, max_size=5),
    sizes,
    st.floats(1e-8, 1e-2),
    st.integers(0, 1500) | st.none(),
)
def test_no_pure_choice_beats_the_selection(given_features, shared, bound, spare):
    """Against every possible choice by brute force, too: the bound is kept where it can be, a budget always."""
    options = {
        str(i): {
            "reconstruct": option({f"{i}.w": own, **({"mlp": shared} if shares else {})}, effect=effect),
            "cache": option({f"{i}.c": cache}, distance=1e-9),
        }
        for i, (own, cache, effect, shares) in enumerate(given_features)
    }
    every = [
        dict(zip(options, c, strict=True))
        for c in itertools.product(("reconstruct", "cache"), repeat=len(options))
    ]
    least = min(total_bytes(options, c) for c in every)
    budget = None if spare is None else least + spare
    try:
        chosen = choose(options, bound=bound, budget=budget)
    except TFMQError:
        assert budget is not None  # greedy, it may miss the one smallest choice, never by a pure one
        assert all(total_bytes(options, dict.fromkeys(options, m)) > budget for m in ("reconstruct", "cache"))
        return
    size, harm = total_bytes(options, chosen), total_disturbance(options, chosen)
    assert budget is None or size <= budget
    if budget is None:
        assert all(options[f][m].disturbance <= bound for f, m in chosen.items())
    for maintenance in ("reconstruct", "cache"):
        pure = dict.fromkeys(options, maintenance)
        assert not (
            total_bytes(options, pure) <= size
            and total_disturbance(options, pure) <= harm
            and (total_bytes(options, pure), total_disturbance(options, pure)) != (size, harm)
        )
