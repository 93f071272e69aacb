"""Look up all numbers of a timestep at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten, attribute, set_buffer
from tfmq_fx.passes.pass_manager import declare

ALIGNED = 4  # float32 numbers: kernels read tensors fastest, and cuDNN only, from addresses that are multiples of 16 bytes


@declare(after=("rescale_temporal",))
def look_up_together(gm: GraphModule) -> PassResult:
    """Look up the entries of vectors at the same index in one operation instead of one for each vector.

        index_select(a, 0, i), index_select(b, 0, i)  ==>  both = index_select(stack(a, b), 1, i); both[0], both[1]
        reciprocal(view(index_select(a, 0, i)))       ==>  view(index_select(reciprocal(a), 0, i))

    A network with scales by timestep has hundreds of such vectors, and a GPU needs as long to start an operation on a few
    numbers as to multiply a small matrix.

    Numerics: bitwise unchanged.
    """
    groups: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=aten.index_select.default):
        table, dim, index = node.args
        if isinstance(table, Node) and table.op == "get_attr" and dim == 0:
            values = attribute(gm, str(table.target))
            if values.dim() == 1:
                groups[index, len(values), values.dtype, values.device].append(node)
    found = [lookups for lookups in groups.values() if len(lookups) > 1]
    for lookups in found:
        _join(gm, [*lookups, *(inverse for n in lookups for inverse in _inverses(gm, n))])
    if found:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(found))


def _inverses(gm: GraphModule, lookup: Node) -> Iterator[Node]:
    """Look up the reciprocals that are computed of a lookup, and yield those lookups."""
    table, *where = lookup.args
    for view in list(lookup.users):
        for node in list(view.users) if view.target is aten.view.default else []:
            if node.target is aten.reciprocal.default:
                name = f"{node.name}_table"
                set_buffer(gm, name, attribute(gm, str(table.target)).reciprocal())  # type: ignore[union-attr]
                with gm.graph.inserting_before(node):
                    inverse = gm.graph.call_function(lookup.target, (gm.graph.get_attr(name), *where))  # type: ignore[arg-type]
                    inverse.meta = {n: v for n, v in lookup.meta.items() if n == "val"}
                    again = gm.graph.call_function(aten.view.default, (inverse, view.args[1]))
                again.meta = {n: v for n, v in node.meta.items() if n == "val"}
                node.replace_all_uses_with(again)
                gm.graph.erase_node(node)
                yield inverse


def _join(gm: GraphModule, lookups: list[Node]) -> None:
    first = lookups[0]
    index = first.args[2]
    assert isinstance(index, Node)
    tables = torch.stack([attribute(gm, str(n.args[0].target)) for n in lookups])  # type: ignore[union-attr]
    name = f"{first.name}_tables"
    set_buffer(gm, name, tables[:, None].repeat(1, ALIGNED, 1))
    call = gm.graph.call_function
    with gm.graph.inserting_after(index):
        table = gm.graph.get_attr(name)
    with gm.graph.inserting_after(table):
        together = call(aten.index_select.default, (table, 2, index))
    for i, node in enumerate(lookups):
        with gm.graph.inserting_before(node):
            entry = call(aten.select.int, (call(aten.select.int, (together, 0, i)), 0, 0))
        entry.meta = {n: v for n, v in node.meta.items() if n == "val"}
        node.replace_all_uses_with(entry)
        gm.graph.erase_node(node)
