"""Write arithmetic of sizes by the few operators that every runtime knows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten, fixed_size, meta_value, put_in_place


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


def _call(gm: GraphModule, function: Callable[..., Any], *args: Any) -> Node:
    node = gm.graph.call_function(function, args)
    values = (meta_value(a) if isinstance(a, Node) else a for a in args)
    node.meta["val"] = function(*values)
    return node


def _numel(gm: GraphModule, x: Node) -> Any:
    product: Any = 1
    for i, size in enumerate(meta_value(x).shape):
        fixed = fixed_size(size)
        factor = _call(gm, aten.sym_size.int, x, i) if fixed is None else fixed
        both = isinstance(factor, int) and isinstance(product, int)
        product = factor * product if both else _call(gm, operator.mul, factor, product)
    return product


def _remainder(gm: GraphModule, a: Any, b: Any) -> Node:
    return _call(gm, operator.sub, a, _call(gm, operator.mul, _call(gm, operator.floordiv, a, b), b))


def _negative(gm: GraphModule, a: Any) -> Node:
    return _call(gm, operator.sub, 0, a)


_WRITTEN: dict[Any, Callable[..., Any]] = {
    aten.sym_numel.default: _numel,
    operator.mod: _remainder,
    operator.neg: _negative,
}
