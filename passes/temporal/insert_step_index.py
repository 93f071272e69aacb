"""Compute the step index once, from the `timestep` input, as a value in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.inputs import placeholders, require_input, timestep_input
from tfmq_fx.graph.nodes import aten, count, meta_value, on_device_of, set_buffer

TIMESTEPS = "timestep_table"
STEP = "step_index"


def insert_step_index(
    gm: GraphModule,
    *,
    timesteps: Tensor,
    timestep: str | None = None,
    finite: Mapping[str, Tensor] | None = None,
) -> PassResult:
    """Insert step_index = argmin |timestep_table - timestep|: (N,) int64 indices into `timesteps` (T,).

    A timestep of shape (N,) gives one index per sample, one of shape () a single index, and one of shape (N, tokens)
    one for each of its entries, (N * tokens,). Values outside the table take their nearest neighbour (in L_1). Adds nodes only: outputs are bitwise unchanged.

    timestep: the input's name, see `timestep_input`.
    finite: other inputs with finitely many values, name -> (K, ...); each gets an index `<name>_index` likewise.
    """
    if gm.graph.find_nodes(op="get_attr", target=TIMESTEPS):
        return PassResult(gm, False)
    source = timestep_input(gm, timestep)
    last = list(placeholders(gm).values())[-1]
    with gm.graph.inserting_before(last.next):
        _index(gm, source, timesteps, TIMESTEPS, STEP)
        for name, values in (finite or {}).items():
            _index(gm, require_input(gm, name, argument="finite"), values, f"{name}_table", f"{name}_index")
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


def _index(gm: GraphModule, source: Node, values: Tensor, buffer: str, name: str) -> None:
    known = on_device_of(source, values.to(torch.float64))
    set_buffer(gm, buffer, known.flatten(1) if values.dim() > 1 else known)
    call = gm.graph.call_function
    table = gm.graph.get_attr(buffer)
    row = call(aten.to.dtype, (source, torch.float64))
    if values.dim() > 1:  # vectors: one index per row of the input
        row = call(aten.reshape.default, (row, [-1, 1, values[0].numel()]))
        distance = call(
            aten.sum.dim_IntList, (call(aten.abs.default, (call(aten.sub.Tensor, (table, row)),)), [2])
        )
    else:
        row = call(aten.reshape.default, (row, [-1, 1]))
        distance = call(aten.abs.default, (call(aten.sub.Tensor, (table, row)),))
    index = call(aten.argmin.default, (distance, 1))
    index.name = name


def step_index(gm: GraphModule) -> Node:
    """Return the node that `insert_step_index` made."""
    node: Node = next(n for n in gm.graph.nodes if n.name == STEP)
    return node


def key_index(gm: GraphModule, key: Sequence[str], *, timestep: str, sizes: Mapping[str, int]) -> Node:
    """Return the row-major index into the product of the key's inputs, made once per key.

    ("timestep", "class_labels")   ==>   step_index * K + class_labels_index

    Where a sample has several timesteps, the indices of its other inputs are repeated for each.

    `insert_step_index` must run first. sizes: name -> number of values, for the timestep and the finite
    inputs.
    """
    nodes: dict[str, Node] = {n.name: n for n in gm.graph.nodes}
    index_of = {name: nodes[STEP if name == timestep else f"{name}_index"] for name in sizes}
    last = list(index_of.values())[-1]
    index, made = index_of[key[0]], key[0]
    for name in key[1:]:
        made = f"{made}_and_{name}"
        if f"{made}_index" in nodes:
            index = last = nodes[f"{made}_index"]
            continue
        with gm.graph.inserting_after(last):
            rows = gm.graph.call_function(aten.mul.Scalar, (index, sizes[name]))
        other = index_of[name]
        if key[0] == timestep:
            other = for_each_entry(gm, other, timestep=timestep, after=rows)
        with gm.graph.inserting_after(rows if other is index_of[name] else other):
            index = last = gm.graph.call_function(aten.add.Tensor, (rows, other))
        index.name = f"{made}_index"
    return index


def for_each_entry(gm: GraphModule, x: Node, *, timestep: str, after: Node) -> Node:
    """Return x (N,), repeated for each entry that a sample's timestep has: (N * tokens,). x itself if it has one.

    after: the node behind which it is inserted.
    """
    t, call = meta_value(placeholders(gm)[timestep]), gm.graph.call_function
    entries = count(t.shape[1:]) if isinstance(t, Tensor) and t.dim() > 1 else 1
    if entries == 1:
        return x
    for target, arguments in (
        (aten.reshape.default, [-1, 1]),
        (aten.expand.default, [-1, int(entries)]),
        (aten.reshape.default, [-1]),
    ):
        with gm.graph.inserting_after(after):
            x = after = call(target, (x, arguments))
    return x
