"""Tell which rows of a recording have the condition: guidance adds rows without it (Ho & Salimans 2022).

The same samples are drawn once more without guidance. A row has the condition if that run has it, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.calibration.calls import Flat

SCALES = re.compile(r".*(guidance|cfg)_scale.*|guidance|cfg")  # the names of guidance's scales
OFF = (
    1.0,
    0.0,
)  # the scales without guidance: first that of the papers, then that of pipelines which start at 0
# Relative distance up to which two rows are the same: in bfloat16 (eps 2**-7), a text encoder at another batch size
# sums in another order. Different prompts are about 0.5 apart.
NOISE = 2**-5


def without_guidance(takes: Collection[str], given: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """Yield changes of a pipeline's arguments that may switch its guidance off, each to be tried in turn.

    takes: the names of its arguments. given: those that the caller gives.
    """
    names = [n for n in takes if SCALES.fullmatch(n)]
    one_by_one = [{n: OFF[0]} for n in names]
    together = [dict.fromkeys(names, scale) for scale in OFF]
    tried: list[dict[str, float]] = []
    for changes in [*one_by_one, *together]:
        if changes and changes not in tried and any(given.get(n) != x for n, x in changes.items()):
            tried.append(changes)
            yield changes


@dataclass(frozen=True, kw_only=True)
class Unguided:
    """How a pipeline is run without guidance, and which of its network's arguments tell the condition."""

    changes: dict[str, float]  # of the pipeline's arguments
    conditions: tuple[str, ...]  # flat names


def conditions(calls: Sequence[Flat], names: Collection[str]) -> tuple[str, ...]:
    """Return the names of tensors that are the same in all calls, which are from runs without guidance, of two seeds.

    Others depend on the sample, as a ControlNet's residuals do, or on chance. Another run says nothing about them.
    """
    first, *others = calls
    return tuple(
        n for n in names
        if all(n in c and c[n].shape == first[n].shape and bool(near(c[n], first[n]).all()) for c in others)
    )  # fmt: skip


def conditional_rows(calls: Sequence[Flat], sizes: Sequence[int], expected: Mapping[str, Tensor]) -> Tensor:
    """Return which rows of all calls have the condition, (rows,) bool.

    sizes: the number of rows of each call. expected: the conditions in a run without guidance, (R, ...) each.
    """
    found = torch.ones(sum(sizes), dtype=torch.bool)
    for name, x in expected.items():
        found &= torch.cat([_rows_near(c.get(name), x, size) for c, size in zip(calls, sizes, strict=True)])
    return found


def _rows_near(value: Any, expected: Tensor, size: int) -> Tensor:
    if not isinstance(value, Tensor) or not value.dim() or len(value) not in (1, size):
        return torch.zeros(size, dtype=torch.bool)
    return near(value.expand(size, *value.shape[1:]), expected)


def near(a: Tensor, b: Tensor) -> Tensor:
    """Return which rows of a (S, ...) are those of b (R, ...), up to noise: (S,) bool.

    Both repeat the gcd(S, R) samples as a whole. Each repetition is taken as a whole, too: a sample whose prompt is the
    negative one has equal rows with and without the condition.
    """
    if a.shape[1:] != b.shape[1:]:
        return torch.zeros(len(a), dtype=torch.bool)
    samples = math.gcd(len(a), len(b))
    x, y = a.cpu().reshape(-1, 1, samples, a[0].numel()), b.cpu().reshape(1, -1, samples, b[0].numel())
    if x.is_floating_point() and y.is_floating_point():
        equal = (x.float() - y.float()).norm(dim=-1) <= NOISE * y.float().norm(dim=-1)
    else:
        equal = (x == y).all(-1)
    found: Tensor = equal.all(-1).any(-1).repeat_interleave(samples)
    return found
