"""Compute int8 linears that read the same bytes in one product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import add_call, aten, attribute, hinted_shape, meta_value, set_buffer
from tfmq_fx.passes.int8.kernels import LAYER, arguments_of
from tfmq_fx.passes.int8.rescale_temporal import PRECISE
from tfmq_fx.passes.int8.share_quantized import MOVES
from tfmq_fx.passes.pass_manager import declare

# Output channels of one product. All layers of a network may read the same text, and their results wait for their readers.
COLUMNS = 16384
_BY_CHANNEL = ("weight", "weight_zero", "scale", "correction", "bias")


@declare(after=("share_quantized",))
def merge_linears(gm: GraphModule) -> PassResult:
    """Merge GPU kernels of linears with the same input and the same epilogue, such as those of q, k and v.

        int8_linear(x, w1, ..), int8_linear(x, w2, ..)  ==>  split(int8_linear(x, cat(w1, w2), ..), [len(w1), len(w2)])

    One product of more columns fills a GPU better, and reads x once. Kernels that add a tensor stay apart. What only one of
    them has, a bias or a correction, is zero for the others.

    Numerics: bitwise unchanged.
    """
    groups: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.tfmq.int8_linear.default):
        given = arguments_of(node)
        if given["residual"] is None:
            same = tuple(repr(value) for name, value in given.items() if name not in _BY_CHANNEL)
            groups[(*same, given["weight_zero"] is None, bool(node.meta.get(PRECISE)))].append(node)
    found = [some for kernels in groups.values() for some in _parts(kernels) if len(some) > 1]
    for some in found:
        _merge(gm, some)
    if found:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(found))


def _parts(kernels: Sequence[Node]) -> Iterator[list[Node]]:
    """Yield neighbours that have at most COLUMNS columns together."""
    part: list[Node] = []
    for kernel in kernels:
        if part and sum(hinted_shape(k)[-1] for k in (*part, kernel)) > COLUMNS:
            yield part
            part = []
        part.append(kernel)
    yield part


def _merge(gm: GraphModule, kernels: Sequence[Node]) -> None:
    first, widths = kernels[0], [hinted_shape(k)[-1] for k in kernels]
    given = [arguments_of(k) for k in kernels]
    with gm.graph.inserting_before(first):
        for name in _BY_CHANNEL:
            parts = [None if g[name] is None else attribute(gm, str(g[name].target)) for g in given]
            if any(p is not None for p in parts):
                set_buffer(gm, f"{first.name}_merged_{name}", _joined(parts, widths))
                given[0][name] = gm.graph.get_attr(f"{first.name}_merged_{name}")
        merged = gm.graph.call_function(first.target, tuple(given[0].values()))  # type: ignore[arg-type]
        merged.meta = {n: v for n, v in first.meta.items() if n == PRECISE} | {
            "val": torch.cat([meta_value(k) for k in kernels], dim=-1),
            LAYER: tuple(name for k in kernels for name in k.meta[LAYER]),
        }
        parts_of = add_call(gm.graph, aten.split_with_sizes.default, merged, widths, -1)
        for i, kernel in enumerate(kernels):
            part = add_call(gm.graph, getitem, parts_of, i)
            _without_views(kernel)
            kernel.replace_all_uses_with(part)
    for kernel in kernels:
        gm.graph.erase_node(kernel)


def _joined(parts: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor:
    like = next(p for p in parts if p is not None)
    return torch.cat([like.new_zeros(w) if p is None else p for p, w in zip(parts, widths, strict=True)])


def _without_views(kernel: Node) -> None:
    """Let what reads a kernel's numbers through views copy them where a part of a wider tensor has no such view."""
    readers = list(kernel.users)
    while readers:
        node = readers.pop()
        if node.target in MOVES:
            node.target = aten.reshape.default if node.target is aten.view.default else node.target
            readers.extend(node.users)
