"""Join the runs of a network for several kinds of calls to one graph that chooses between values, by row, where they part."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.tools_common import stable_topological_sort
from torch.utils import _pytree as pytree

from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import add_call, ancestors, aten, attribute, hinted_shape, meta_value

_is_node: Callable[[Any], bool] = lambda x: isinstance(x, Node)  # noqa: E731


def merge_variants(gm: GraphModule, *, kinds: str) -> PassResult:
    """Compute once what several kinds of calls have in common. Bitwise unchanged for operators that compute each row by itself.

        where(kinds == 1, f(g(x)), f(h(g(x))))   ==>   f(where(kinds == 1, g(x), h(g(x))))

    Each layer is then in the graph once, as in the network, and what one kind of calls skips is computed for all rows. Operators of two
    runs are the same if they have the same weights and literals, in the same order. A value is chosen by row where
    its size is the batch, or a multiple in the first dimension; what cannot be chosen stays computed twice.

    kinds: the name of the input (N,) that says which kind of call each row is of. A graph without it stays as it is.
    """
    source = placeholders(gm).get(kinds)
    if source is None:
        return PassResult(gm, False)
    for chosen in [n for n in source.users if n.target == aten.eq.Scalar]:
        _Merge(gm, chosen).run()
    stable_topological_sort(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


class _Merge:
    """Joins the run of one kind of calls to that of the others.

    rows: (N,) bool, which rows are of this kind.
    """

    def __init__(self, gm: GraphModule, rows: Node) -> None:
        self.gm, self.graph, self.rows = gm, gm.graph, rows
        self.batch = meta_value(rows).shape[0]
        self.choices: dict[tuple[Node, Node], Node | None] = {}

    def run(self) -> None:
        ends = [n for n in _uses(self.rows) if n.target == aten.where.self]
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        before, own = (ancestors(n for end in ends if isinstance(n := end.args[i], Node)) for i in (2, 1))
        first, second = (sorted(nodes, key=order.__getitem__) for nodes in (before, own - before))
        for a, b in _aligned(first, second, self.gm):
            if self._join(a, b):
                b.replace_all_uses_with(a)
        for end in ends:
            if isinstance(chosen := end.args[1], Node) and chosen is end.args[2]:
                end.replace_all_uses_with(chosen)

    def _join(self, a: Node, b: Node) -> bool:
        """Let `a` compute the rows of `b`, too. Return False if its arguments cannot be chosen by row."""
        if a.op == "get_attr":
            return torch.equal(attribute(self.gm, str(a.target)), attribute(self.gm, str(b.target)))
        (mine, structure), (others, _) = (
            pytree.tree_flatten((n.args, n.kwargs), is_leaf=_is_node) for n in (a, b)
        )
        found = [self._chosen(x, y) for x, y in zip(mine, others, strict=True)]
        if any(x is None and y is not None for x, y in zip(found, mine, strict=True)):
            return False
        a.args, a.kwargs = pytree.tree_unflatten(found, structure)
        return True

    def _chosen(self, x: Any, y: Any) -> Any:
        """Return what has x, or y in the rows of this kind; None if there is no such value."""
        if x is y or not isinstance(x, Node) or not isinstance(y, Node):
            return x  # literals are equal, since aligned operators have the same
        if (x, y) not in self.choices:
            self.choices[x, y] = self._choice(x, y)
        return self.choices[x, y]

    def _choice(self, x: Node, y: Node) -> Node | None:
        like, other = meta_value(x), meta_value(y)
        if not isinstance(like, Tensor) or not isinstance(other, Tensor) or like.dtype != other.dtype:
            return None
        rows = self._rows_for(x)
        if rows is None or hinted_shape(x) != hinted_shape(y):
            return None
        with self.graph.inserting_after(y):
            node = self.graph.call_function(aten.where.self, (rows, y, x))
        node.meta = dict(x.meta)
        return node

    def _rows_for(self, x: Node) -> Node | None:
        """Return which rows of a tensor are of this kind, in a shape that broadcasts to it; None if it has no rows."""
        shape, rows = meta_value(x).shape, self.rows
        dimension = next((i for i, d in enumerate(shape) if _times(d, self.batch) == 1), None)
        if dimension is None:
            times = _times(shape[0], self.batch) if shape else None
            if times is None:
                return None
            if not times.is_Integer:  # a number of tokens or frames, which moves
                sizes = (self._add(aten.sym_size.int, n, 0) for n in (x, rows))
                times = self._add(operator.floordiv, *sizes)
            repeats = times if isinstance(times, Node) else int(times)
            dimension, rows = 0, self._add(aten.repeat_interleave.self_int, rows, repeats)
        for i in range(len(shape) - 1):
            rows = self._add(aten.unsqueeze.default, rows, 0 if i < dimension else -1)
        return rows

    def _add(self, target: Any, *arguments: Any) -> Node:
        """Return the node that calls an operator, a new one if there is none."""
        for user in arguments[0].users:
            if user.target == target and user.args == arguments:
                return user  # type: ignore[no-any-return]
        with self.graph.inserting_after(arguments[0]):
            return add_call(self.graph, target, *arguments)


def _uses(rows: Node) -> Iterator[Node]:
    """Yield what reads a mask of rows, in any shape."""
    for user in rows.users:
        if user.target == aten.unsqueeze.default:
            yield from _uses(user)
        else:
            yield user


def _aligned(first: list[Node], second: list[Node], gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Yield the operators that two runs have in common, in order."""
    keys = [[_key(n, gm) for n in nodes] for nodes in (first, second)]
    match = SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    for a, b, size in match.get_matching_blocks():
        yield from zip(first[a : a + size], second[b : b + size], strict=True)


def _key(node: Node, gm: GraphModule) -> str:
    """Return what equal operators of two runs share: the operator, its literals and weights, and its result's shape."""
    if node.op == "get_attr":
        value = attribute(gm, str(node.target))
        return (
            f"{node.op} {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(node.target)
        )
    weights = {n: str(n.target) for n in node.all_input_nodes if n.op == "get_attr" and _is_parameter(gm, n)}
    shown = map_arg((node.args, node.kwargs), lambda n: weights.get(n, ""))
    shape = hinted_shape(node) if isinstance(meta_value(node), Tensor) else ""
    return f"{node.op} {node.target} {shown} {shape}"


def _is_parameter(gm: GraphModule, node: Node) -> bool:
    """Return True for a parameter, which both runs read; a constant is made anew in each."""
    return isinstance(attribute(gm, str(node.target)), nn.Parameter)


def _times(size: Any, batch: Any) -> Any:
    """Return k, a sympy expression, if a size is k times the batch; None if it is no whole number of times."""
    if not isinstance(size, torch.SymInt) or not isinstance(batch, torch.SymInt):
        return None
    times = size.node.expr / batch.node.expr
    return times if times.is_integer else None
