"""Compare the values of an input with the table of the values that are known for it."""

from __future__ import annotations

import torch
from torch import Tensor


def unknown_values(given: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values (U, ...) of an input that are not in its table (K, ...), and the table, in one dtype.

    In half precision, a schedule's value is that value rounded.
    """
    given = given.detach().cpu()
    if given.is_floating_point() and table.is_floating_point():
        coarser = max(given.dtype, table.dtype, key=lambda d: torch.finfo(d).eps)
        given, table = given.to(coarser), table.to(coarser)
    else:
        same = given.is_floating_point() == table.is_floating_point()
        given = given.to(table.dtype if same else torch.float64)
    values = given.reshape(-1, *table.shape[1:]).unique(dim=0)
    known = (values[:, None] == table).reshape(len(values), len(table), table[0].numel()).all(2).any(1)
    return values[~known], table
