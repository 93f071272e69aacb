"""Keep the NaN of an input in the output, and infinity as NaN: integers have neither, and a picture that looks valid would come of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_fx.base.ambient import traced


def with_nan_rows(output: Any, inputs: Collection[Tensor], *, sample: Tensor) -> Any:
    """Return the outputs, with NaN in every row for which an input holds NaN, or the noisy sample (N, ...) infinity.

    An input without rows, or a timestep for all, counts for every row; an output without rows becomes NaN as a whole. Infinity
    elsewhere may be a mask's.
    """
    batch = sample.shape[0]
    found = [_rows(x, batch, infinity=x is sample) for x in inputs if x.is_floating_point()]
    if not found:
        return output
    nan_N = torch.stack(found).any(0)
    on_cpu = nan_N.device.type == "cpu"  # elsewhere, to ask would be to wait for all that is computed there
    if on_cpu and not traced(inputs) and not nan_N.any():
        return output

    def marked(y: Tensor) -> Tensor:
        if not y.is_floating_point():
            return y
        rows = y.dim() > 0 and y.shape[0] == batch
        mask = nan_N.view(-1, *[1] * (y.dim() - 1)) if rows else nan_N.any()
        return y.masked_fill(mask, torch.nan)

    return pytree.tree_map_only(Tensor, marked, output)


def _rows(x: Tensor, batch: int, *, infinity: bool) -> Tensor:
    """Return for each row (N,) whether the input holds NaN there, or infinity."""
    nan = ~x.isfinite() if infinity else x.isnan()
    if not x.dim() or x.shape[0] != batch:
        return nan.any().expand(batch)
    return nan.any(dim=list(range(1, x.dim()))) if x.dim() > 1 else nan
