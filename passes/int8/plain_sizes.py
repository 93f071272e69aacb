"""Write arithmetic of sizes by the few operators that every runtime knows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import add_call, aten, fixed_size, meta_value, put_in_place


def plain_sizes(gm: GraphModule) -> PassResult:
    """Compute sizes by products, quotients, sums and differences alone. Equal for all sizes.

    numel(x)  ==>  size(x, 0) * 3       a % b  ==>  a - a // b * b       -a  ==>  0 - a
    """
    modified = False
    for node in list(gm.graph.nodes):
        write = _WRITTEN.get(node.target) if node.op == "call_function" else None
        if write is not None:
            with gm.graph.inserting_before(node):
                put_in_place(node, write(gm, *node.args))
            modified = True
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def _numel(gm: GraphModule, x: Node) -> Any:
    product: Any = 1
    for i, size in enumerate(meta_value(x).shape):
        fixed = fixed_size(size)
        factor = add_call(gm.graph, aten.sym_size.int, x, i) if fixed is None else fixed
        both = isinstance(factor, int) and isinstance(product, int)
        product = factor * product if both else add_call(gm.graph, operator.mul, factor, product)
    return product


def _remainder(gm: GraphModule, a: Any, b: Any) -> Node:
    return add_call(
        gm.graph,
        operator.sub,
        a,
        add_call(gm.graph, operator.mul, add_call(gm.graph, operator.floordiv, a, b), b),
    )


def _negative(gm: GraphModule, a: Any) -> Node:
    return add_call(gm.graph, operator.sub, 0, a)


_WRITTEN: dict[Any, Callable[..., Any]] = {
    aten.sym_numel.default: _numel,
    operator.mod: _remainder,
    operator.neg: _negative,
}
