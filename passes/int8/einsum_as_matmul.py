"""Write torch.einsum as the matrix product that it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def einsum_as_matmul(equation: str, operands: Sequence[Tensor], **_path: Any) -> Tensor:
    """Compute einsum("bct,bcs->bts", (q, k)) as q.transpose(1, 2) @ k. Runtimes take a transpose into their product.

    torch's own way permutes the operands around dimensions of one, which keeps runtimes from it: they copy the attention
    map. It computes what is not a product of two operands with one dimension to sum, and one of each for the result.
    """
    terms, _, out = equation.replace(" ", "").partition("->")
    indices = [*terms.split(","), out]
    if len(indices) != 3 or "." in equation or any(len(set(i)) < len(i) for i in indices):
        return torch.einsum(equation, *operands)
    (a, b), (x, y) = indices[:2], operands
    batch = [i for i in out if i in a and i in b]
    summed, left, right = (
        [i for i in where if i not in batch and (i in out) == kept and (i in other) != kept]
        for where, other, kept in ((a, b, False), (a, b, True), (b, a, True))
    )
    if [len(i) for i in (summed, left, right)] != [1, 1, 1] or {*a, *b} != {*batch, *summed, *left, *right}:
        return torch.einsum(equation, *operands)
    if out == "".join((*batch, *right, *left)):
        (a, b), (x, y), (left, right) = (b, a), (y, x), (right, left)
    product = _in_order(x, a, [*batch, *left, *summed]) @ _in_order(y, b, [*batch, *summed, *right])
    return _in_order(product, [*batch, *left, *right], out)


def _in_order(x: Tensor, indices: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Return a tensor whose dimensions have these indices, with the dimensions in another order."""
    return x if list(indices) == list(wanted) else x.permute([indices.index(i) for i in wanted])
