"""Rows whose sizes differ, such as prompts of different lengths: kept padded, and cut where they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSizes:
    """The sizes of rows that are kept padded with zeros to the largest, and what such a size brings with it.

    of: tensor's name -> the size of each row, (N, D), without the batch.
    shared: the name of a tensor without rows that is not the same in all calls, such as the positions of a prompt's tokens ->
        which of `values` each row's call had, (N,).
    """

    of: Mapping[str, Tensor]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> Tensor:
        """Return a number for each row, (N,), which is the same for rows that one call can have."""
        found = [*self.of.values(), *(which[:, None] for which in self.shared.values())]
        kinds: Tensor = torch.cat(found, dim=1).unique(dim=0, return_inverse=True)[1]
        return kinds

    def rows(self, chosen: Tensor | slice) -> RowSizes:
        """Return the sizes of these rows, given by index or by mask."""
        return RowSizes(
            {n: sizes[chosen] for n, sizes in self.of.items()},
            {n: which[chosen] for n, which in self.shared.items()},
            self.values,
        )

    def groups(self, rows: Tensor) -> list[Tensor]:
        """Return the indices of rows as groups of one kind each, in the order of their first rows."""
        kinds = self.kinds[rows]
        return [rows[kinds == k] for k in dict.fromkeys(kinds.tolist())]

    def most(self) -> Tensor:
        """Return the indices of the rows of the most frequent kind, of those without sizes of one, which traces make constants."""
        larger = torch.stack(
            [torch.ones_like(self.kinds, dtype=torch.bool), *((s > 1).all(1) for s in self.of.values())]
        ).all(0)
        kinds = self.kinds[larger] if bool(larger.any()) else self.kinds
        found: Tensor = (self.kinds == kinds.mode().values).nonzero().flatten()
        return found

    def cut(self, name: str, padded: Tensor, rows: Tensor | slice) -> Any:
        """Return rows without their padding, (N, ...); as a list if their sizes differ."""
        if name not in self.of:
            return padded
        sizes = self.of[name][rows]
        if bool((sizes == sizes[:1]).all()):
            # Contiguous, as a pipeline's own: a capture would take notice of the strides.
            return padded[(slice(None), *map(slice, sizes[0].tolist()))].contiguous()
        return [x[tuple(map(slice, size))] for x, size in zip(padded, sizes.tolist(), strict=True)]

    def taken(self, name: str, rows: Tensor | slice) -> Tensor:
        """Return a tensor without rows as these rows' call had it."""
        return self.values[name][int(self.shared[name][rows][0])]


def padded(pieces: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Return pieces (N_i, ...) of different sizes as one tensor (sum N_i, ...), padded with zeros. out: where to put it."""
    shape = [sum(map(len, pieces)), *map(max, zip(*(x.shape[1:] for x in pieces), strict=True))]
    whole = pieces[0].new_zeros(shape) if out is None else out
    start = 0
    for x in pieces:
        whole[(slice(start, start + len(x)), *map(slice, x.shape[1:]))] = x
        start += len(x)
    return whole
