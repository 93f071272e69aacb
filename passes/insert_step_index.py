"""Compute the step index once, from the `timestep` input, as a value in the graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph import aten, placeholders, require_input, set_buffer

TIMESTEPS = "timestep_table"
STEP = "step_index"


def insert_step_index(gm: GraphModule, *, timesteps: Tensor, timestep: str = "timestep") -> PassResult:
    """step_index = argmin |timestep_table - timestep|: (N,) int64 indices into `timesteps` (T,).

    A timestep of shape (N,) gives one index per sample, one of shape () gives one index in all. Values
    outside the table take their nearest neighbour. Adds nodes only: outputs are bitwise unchanged.
    """
    if gm.graph.find_nodes(op="get_attr", target=TIMESTEPS):
        return PassResult(gm, False)
    source = require_input(gm, timestep)
    set_buffer(gm, TIMESTEPS, timesteps.to(torch.float64))
    last = list(placeholders(gm).values())[-1]
    call = gm.graph.call_function
    with gm.graph.inserting_before(last.next):
        table = gm.graph.get_attr(TIMESTEPS)
        column = call(aten.reshape.default, (call(aten.to.dtype, (source, torch.float64)), [-1, 1]))
        distance = call(aten.abs.default, (call(aten.sub.Tensor, (table, column)),))
        index = call(aten.argmin.default, (distance, 1))
        index.name = STEP
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


def step_index(gm: GraphModule) -> Node:
    node: Node = next(n for n in gm.graph.nodes if n.name == STEP)
    return node
