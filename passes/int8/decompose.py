"""Write the operators that a runtime does not know by those that it knows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from tfmq_fx.graph.fakes import kind_of_call
from tfmq_fx.graph.nodes import fake_mode_of, meta_value, mutated_inputs, paste, put_in_place, set_buffer

Table = Mapping[OpOverload, Callable[..., Any]]


def decompose(gm: GraphModule, *, table: Table) -> PassResult | None:
    """Replace operators by others, as torch.export's `run_decompositions(table)` does, without tracing the whole graph.

        conv2d(x, w, b, 1, 1)  ==>  convolution(x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    table: operator -> a function that computes the same by other operators. What may or may not be a view of its input,
    such as reshape, is replaced, too. Each operator is traced once for every kind of its arguments: shapes, dtypes
    and numbers.

    The nodes must have fake values. Numerics: those of the table's functions. Returns None, with the graph as it was,
    if one of them writes in place: that takes a trace of the whole.
    """
    traced: dict[Hashable, GraphModule] = {}
    mode = fake_mode_of(gm.graph.nodes) or nullcontext()
    wanted = [(n, kind_of_call(n) or n) for n in gm.graph.nodes if _is_replaced(n.target, table)]
    for node, kind in wanted:
        if kind not in traced:
            with mode:  # for operators that read no tensor, such as ones
                traced[kind] = _traced(node, table)
            if any(mutated_inputs(n) for n in traced[kind].graph.nodes):
                return None
    wanted = [(node, kind) for node, kind in wanted if not _is_same(traced[kind], node)]
    # Inputs by their places, since two may become one when what computes them is replaced.
    places = {node: [_flat(node).index(x) for x in node.all_input_nodes] for node, _ in wanted}
    for i, (node, kind) in enumerate(wanted):
        inner, flat = traced[kind], _flat(node)
        inputs = [flat[place] for place in places[node]]
        taken = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for constant in {n.target for n in inner.graph.find_nodes(op="get_attr")}:
            set_buffer(gm, f"decomposed_{i}.{constant}", getattr(inner, constant))
        with gm.graph.inserting_before(node):
            result = paste(gm.graph, inner.graph, taken, prefix=f"decomposed_{i}")
        put_in_place(node, result)
    _share_sizes(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, bool(wanted))


def _flat(node: Node) -> list[Any]:
    return pytree.tree_leaves((node.args, node.kwargs))


def _share_sizes(gm: GraphModule) -> None:
    """Let all that read a size read the first node that has it, as in a trace of the whole."""
    first: dict[str, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and isinstance(size := meta_value(node), torch.SymInt):
            other = first.setdefault(str(size), node)
            if other is not node:
                put_in_place(node, other)


def _is_replaced(op: Any, table: Table) -> bool:
    if not isinstance(op, OpOverload):
        return False
    aliases = any(a.alias_info is not None for a in op._schema.arguments)
    return op in table or (_is_implicit(op) and (aliases or torch.Tag.maybe_aliasing_or_mutating in op.tags))


def _is_implicit(op: OpOverload) -> bool:
    """Return True for an operator that torch takes apart before a trace or its table sees it."""
    return op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _is_same(inner: GraphModule, node: Node) -> bool:
    """Return True if all that a trace of this node found is the node's own operator."""
    return [n.target for n in inner.graph.nodes if n.op == "call_function"] == [node.target]


def _traced(node: Node, table: Table) -> GraphModule:
    """Return the graph of other operators that computes this node from `all_input_nodes`."""
    inputs: Sequence[Node] = node.all_input_nodes
    function: Any = node.target
    if _is_implicit(function):
        function = table.get(function, function)

    def compute(*values: Any) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), dict(zip(inputs, values, strict=True)).__getitem__)
        return function(*args, **kwargs)

    with torch.no_grad(), enable_python_dispatcher():
        return make_fx(compute, decomposition_table=table)(*(meta_value(n) for n in inputs))
