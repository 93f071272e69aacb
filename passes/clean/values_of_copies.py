"""Replace copies into a tensor that nothing reads by what is copied."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import add_call, aten, fixed_size, meta_value


def values_of_copies(gm: GraphModule) -> PassResult:
    """Replace the functional form of a write by its value, in the shape and dtype of what was written to. Bitwise unchanged.

        copy(x, y)  ==>  to(expand(y, [sizes of x]), dtype of x)

    `copy` has no derivative, and reads nothing of x.
    """
    copies = gm.graph.find_nodes(op="call_function", target=aten.copy.default)
    for node in copies:
        x, y = node.args[:2]
        assert isinstance(x, Node)
        assert isinstance(y, Node)
        shape, dtype = meta_value(x).shape, meta_value(x).dtype
        with gm.graph.inserting_before(node):
            value = y
            if meta_value(y).shape != shape:
                sizes = [_size(gm, x, i) for i in range(len(shape))]
                value = add_call(gm.graph, aten.expand.default, value, sizes)
            if meta_value(y).dtype != dtype:
                value = add_call(gm.graph, aten.to.dtype, value, dtype)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
    if copies:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(copies))


def _size(gm: GraphModule, x: Node, dim: int) -> int | Node:
    size: int | torch.SymInt = meta_value(x).shape[dim]
    fixed = fixed_size(size)
    return add_call(gm.graph, aten.sym_size.int, x, dim) if fixed is None else fixed
