"""Give the layers of the temporal block one row for each entry of a timestep that has several per sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.fakes import fill_fake_values
from tfmq_fx.graph.inputs import conditioning_vectors, timestep_input
from tfmq_fx.graph.nodes import (
    MOVES,
    ancestors,
    aten,
    count,
    fixed_size,
    hinted_shape,
    is_by_row,
    is_view_or_pointwise,
    meta_value,
    meta_without_value,
    op_name,
)
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.temporal.find_temporal import taint

# What treats all dimensions but the last alike -> the index of its input, and how many last dimensions of that it mixes.
_BY_ROW = {"linear": (0, 1), "layer_norm": (0, 1), "rms_norm": (0, 1), "embedding": (1, 0)}


@declare(after=("bind_parameters", "root_batch_size", "linear_matmuls", "fold_parameters"))
def flatten_entries(gm: GraphModule, *, timestep: str | None = None) -> PassResult:
    """Flatten what the layers of the temporal block read, if the timestep has an entry for each token or frame: (N, K).

        linear(h, W, b), h of (N, K, C)      ==>   reshape(linear(reshape(h, (-1, C)), W, b), (-1, K, D))
        linear(h, W, b), h of (N, K * r, C)  ==>   the same on one of r equal rows, which is then expanded

    Dim 0 of everything that these layers read and compute is then the entries of the batch in their order, as it is the
    samples where the timestep has shape (N,). Layers that flatten their input themselves stay as they are, and so do those
    that read the entries in another order or mixed, and a graph whose timestep has one entry per sample, or without shapes.

    timestep: the input's name, see `timestep_input`.

    Numerics: bitwise unchanged, as torch flattens a linear's input likewise. A product with fewer rows may be summed in another
    order, so where each entry had r rows, it is within a few roundings.
    """
    source = timestep_input(gm, timestep)
    t = meta_value(source)
    if not isinstance(t, Tensor) or t.dim() < 2:
        return PassResult(gm, False)
    with unset_fake_temporarily():  # the numbers are values, also where new tensors would have none
        layouts = _layouts(gm, source)
    for node, layout in layouts.items():
        _flatten(gm, node, t, layout)
    if layouts:
        fill_fake_values(gm)
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(layouts))


def _layouts(gm: GraphModule, source: Node) -> dict[Node, tuple[int, int]]:
    """Return layers to flatten -> (a, b): a sample's rows are (a, K, b), of which those with the same index in K are equal.

    To find out, the entries of the timestep are numbered, and the graph's own views run on the numbers. Behind other operators
    the shape tells; `require_entries_apart` checks it by values.
    """
    allowed = {str(source.target), *conditioning_vectors(gm, str(source.target))}
    marks, sizes = taint(gm), hinted_shape(source)
    total = torch.Size(sizes).numel()
    numbers: dict[Node, Any] = {source: torch.arange(total, dtype=torch.int32).reshape(sizes)}
    left = {n: len(n.users) for n in gm.graph.nodes}
    layers = [n for n in gm.graph.nodes if _is_layer(n) and marks[n] <= allowed]
    needed, found = ancestors(layers), {}
    for node in gm.graph.nodes:
        if node in needed and marks[node] <= allowed and any(n in numbers for n in node.all_input_nodes):
            rows, result = _follow(node, numbers)
            if result is None:
                result = _by_shape(node, meta_value(source))
            if result is not None:
                numbers[node] = result
            layout = None if rows is None else _layout(node, rows.reshape(-1), sizes[0], total)
            if layout is not None:
                found[node] = layout
        for x in node.all_input_nodes:  # kept no longer than needed: real networks have many rows
            left[x] -= 1
            if not left[x]:
                numbers.pop(x, None)
    return found


def _follow(node: Node, numbers: dict[Node, Any]) -> tuple[Tensor | None, Any]:
    """Return the number of the entry that each row of a layer's input is computed from, and the same of its output's elements.

    The first is None for what is no layer, the second where it is not known.
    """
    name = op_name(node)
    if _is_layer(node):
        at, mixed = _BY_ROW[name]
        x = numbers.get(node.args[at])  # type: ignore[arg-type]
        apart = mixed and x is not None and x.stride(-1) and not bool((x == x[..., :1]).all())
        if x is None or apart or (mixed and not is_by_row(node)):
            return None, None
        rows = x[..., 0] if mixed else x
        return rows, rows[..., None].expand(hinted_shape(node))
    if name in (*MOVES, "repeat", "repeat_interleave"):
        return None, _moved(node, numbers)
    if is_view_or_pointwise(node) or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return None, _joined(node, numbers)
    return None, None


def _is_layer(node: Node) -> bool:
    return node.op == "call_function" and op_name(node) in _BY_ROW


def _moved(node: Node, numbers: dict[Node, Any]) -> Any:
    """Return the numbers of a view's elements; -1 for those of other tensors."""

    def argument(n: Node) -> Any:
        if n in numbers:
            return numbers[n]
        value = meta_value(n)
        if isinstance(value, Tensor):
            return torch.full((1,), -1, dtype=torch.int32).expand(hinted_shape(n))
        return value.node.hint if isinstance(value, torch.SymInt) else value

    assert callable(node.target)
    try:
        return node.target(*map_arg(node.args, argument), **map_arg(node.kwargs, argument))
    except (RuntimeError, IndexError, TypeError):  # it needs a size that is no fact of the capture
        return None


def _joined(node: Node, numbers: dict[Node, Any]) -> Tensor | None:
    """Return the numbers of a pointwise operator's elements; None if it joins different entries."""
    given = [numbers[n] for n in node.all_input_nodes if n in numbers]
    if not isinstance(meta_value(node), Tensor) or not all(isinstance(x, Tensor) for x in given):
        return None
    shape = hinted_shape(node)
    result, *others = (x.expand(shape) for x in given)
    return result if all(bool((x == result).all()) for x in others) else None


def _by_shape(node: Node, t: Tensor) -> Tensor | None:
    """Return the numbers of a node's elements, if its first dimensions are all entries of the timestep; else None."""
    value = meta_value(node)
    if not isinstance(value, Tensor) or not value.dim() or fixed_size(value.shape[0]) is not None:
        return None
    shape, entries = hinted_shape(node), count(t.shape)
    lead = next((k for k in range(1, len(shape) + 1) if count(value.shape[:k]) == entries), None)
    if lead is None:
        return None
    numbers = torch.arange(math.prod(shape[:lead]), dtype=torch.int32)
    return numbers.reshape(*shape[:lead], *[1] * (len(shape) - lead)).expand(shape)


def _layout(node: Node, rows: Tensor, batch: int, total: int) -> tuple[int, int] | None:
    """Return how the entries lie in the rows of a layer's input; None if they are its dim 0 already, or lie otherwise."""
    x, entries = (
        node.args[_BY_ROW[op_name(node)][0]],
        torch.arange(total, dtype=torch.int32).reshape(batch, -1),
    )
    size = entries.shape[1]
    if len(rows) % total or not isinstance(meta_value(node), Tensor):
        return None
    own = rows.reshape(batch, -1)
    b = int((own[0] == own[0, 0]).int().cumprod(0).sum())
    a = own.shape[1] // (size * b) if own.shape[1] % (size * b) == 0 else 0
    if not a or not torch.equal(own, entries[:, None, :, None].expand(batch, a, size, b).reshape(batch, -1)):
        return None
    after = [fixed_size(d) for d in (*meta_value(x).shape[1:], *meta_value(node).shape[1:])]  # type: ignore[arg-type]
    flat = meta_value(x).dim() - _BY_ROW[op_name(node)][1] == 1  # type: ignore[arg-type]
    return None if None in after or (flat and a == b == 1) else (a, b)


def _flatten(gm: GraphModule, node: Node, t: Tensor, layout: tuple[int, int]) -> None:
    """Let a layer compute each entry's row once. layout: see `_layouts`."""
    at, mixed = _BY_ROW[op_name(node)]
    x, (a, b), size = node.args[at], layout, int(count(t.shape[1:]))
    assert isinstance(x, Node)
    call = gm.graph.call_function
    columns = [int(d) for d in meta_value(x).shape[meta_value(x).dim() - mixed :]]
    with gm.graph.inserting_before(node):
        rows = x
        if a * b > 1:
            rows = call(aten.reshape.default, (rows, [-1, a, size, b, *columns]))
            rows = call(aten.select.int, (call(aten.select.int, (rows, 3, 0)), 1, 0))
        rows = call(aten.reshape.default, (rows, [-1, *columns]))
        layer = result = gm.graph.node_copy(node, lambda n: rows if n is x else n)
        layer.meta = meta_without_value(node)
        width = int(meta_value(node).shape[-1])
        if a * b > 1:
            result = call(aten.reshape.default, (result, [-1, 1, size, 1, width]))
            result = call(aten.expand.default, (result, [-1, a, size, b, width]))
        result = call(aten.reshape.default, (result, [-1, *(int(d) for d in meta_value(node).shape[1:])]))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
