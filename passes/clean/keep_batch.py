"""Keep the batch where a squeeze would take it from a single row."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import aten, fixed_size, meta_value, squeezed_dims
from tfmq_fx.passes.pass_manager import declare, rewrite_modules


@declare(after=("inline_regions", "batch_rows"))
def keep_batch(gm: GraphModule) -> PassResult:
    """Let a squeeze that would take the batch of a single row take those dimensions alone that were one at capture.

        squeeze(t), t of (N, 1, C)   ==>   squeeze(t, 1)
        squeeze(t, 0)                ==>   t

    The trace had several rows, and what follows in the graph is for them; a single row is then computed as each of several is.
    Other squeezes stay, also those of a size that may vary, such as frames, and so do those in place, and a graph without shape
    metadata. `squeeze(..)` of a graph's output is what a network returns of a single row: `capture` compares that.

    Numerics: bitwise unchanged for several rows.
    """
    inputs = [x for n in placeholders(gm).values() if isinstance(x := meta_value(n), Tensor)]
    rows = {symbol for x in inputs for symbol in _symbols(x.shape[:1])}
    return rewrite_modules(gm, partial(_keep, rows=rows))


def _keep(gm: GraphModule, rows: set[Any]) -> bool:
    modified = False
    for node in list(gm.graph.nodes):
        dims = squeezed_dims(node)
        if not dims:
            continue
        x, sizes = node.args[0], meta_value(node.args[0]).shape
        if not _symbols(sizes[d] for d in dims) & rows:
            continue
        ones = [d for d in dims if fixed_size(sizes[d]) == 1]
        if ones:
            node.target = aten.squeeze.dim if len(ones) == 1 else aten.squeeze.dims
            node.args, node.kwargs = (x, ones[0] if len(ones) == 1 else ones), {}
        else:
            node.replace_all_uses_with(x)
            gm.graph.erase_node(node)
        modified = True
    return modified


def _symbols(sizes: Iterable[int | torch.SymInt]) -> set[Any]:
    return {symbol for d in sizes if isinstance(d, torch.SymInt) for symbol in d.node.expr.free_symbols}
