"""Tell which of a call's tensors have rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.calibration.calls import Flat, same


@dataclass
class Shapes:
    """The shapes of a call's tensors, and which of them have no rows, such as position ids and rotary embeddings.

    A tensor whose first dimension is the number of rows may be so by chance: two frames in a call of two rows, a mask of
    one picture in a call of one. Then calls with another number of rows show that its shape stays the same.
    """

    shared: dict[str, torch.Size]  # of tensors without rows
    likely: dict[str, torch.Size]  # of tensors that seem to have rows
    repeats: dict[str, int]  # of those, how often each row is there: a prompt for every frame
    rows: int  # of the call in which they do
    folded: dict[str, int] = field(
        default_factory=dict
    )  # of other tensors, (rows * k, ...): k, such as frames

    @staticmethod
    def of(call: Flat, rows: int, *, apart: Collection[str]) -> Shapes:
        """Return what one call shows. apart: the names of tensors that are told apart otherwise: the timestep's, for one."""
        found = {n: x for n, x in call.items() if n not in apart and isinstance(x, Tensor)}
        repeated = {n: k for n, x in found.items() if (k := repeats(x, rows)) > 1}
        shapes = {n: x.shape for n, x in found.items()}
        shared = {n: s for n, s in shapes.items() if n not in repeated and (not s or s[0] != rows)}
        return Shapes(shared, {n: s for n, s in shapes.items() if n not in shared}, repeated, rows)

    def see(self, calls: Sequence[Flat], sizes: Sequence[int]) -> None:
        """Move the tensors that have the same shape in calls with other numbers of rows to those without rows.

        One that is the same for all rows of a call, (1, ...), but not in all calls, is left: it has rows.
        """
        told = self.rows not in sizes
        for name, shape in self.likely.items():
            values = [call.get(name) for call in calls]
            fixed = told and all(isinstance(x, Tensor) and x.shape == shape for x in values)
            # Groups of equal rows that differ from each other are one for each row: by chance, all rows would be equal.
            unknown = not told and name in self.repeats and _all_equal(values[0])
            if unknown or (fixed and (shape[0] > 1 or all(same(x, values[0]) for x in values))):
                self.shared[name] = shape
                self.repeats.pop(name, None)
        self.likely = {}

    def may_be_folded(self, calls: Sequence[Flat], size_of: Callable[[Flat], int]) -> dict[str, int]:
        """Return the tensors that have k entries for each row of all calls, and k, and are not the same in all of them.

        size_of: the number of rows of a call.
        """
        found = {n: s[0] // self.rows for n, s in self.shared.items() if s and s[0] > self.rows}

        def fits(name: str, k: int) -> bool:
            values = [call.get(name) for call in calls]
            moves = any(not same(values[0], x) for x in values)
            return moves and all(
                isinstance(x, Tensor) and x.shape[:1] == (k * size_of(call),)
                for x, call in zip(values, calls, strict=True)
            )

        return {n: k for n, k in found.items() if fits(n, k)}


def _all_equal(x: Any) -> bool:
    return not isinstance(x, Tensor) or bool((x == x[:1]).all())


def repeats(x: Tensor, rows: int) -> int:
    """Return k if each of `rows` rows of a tensor is there k times in a row; 1 if they differ, or are not k * rows."""
    if not x.dim() or not rows or x.shape[0] % rows or x.shape[0] == rows:
        return 1
    groups = x.unflatten(0, (rows, -1))
    return groups.shape[1] if bool((groups == groups[:, :1]).all()) else 1
