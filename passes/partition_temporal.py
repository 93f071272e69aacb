"""Make the temporal block a submodule whose outputs are the temporal features."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.utils.fuser_utils import erase_nodes, fuse_as_graphmodule, insert_subgm

from tfmq_fx.graph import placeholders
from tfmq_fx.passes.find_temporal import TemporalBlock

BLOCK_NAME = "temporal_block"


def block_nodes(gm: GraphModule, temporal: TemporalBlock) -> list[Node]:
    """The block's nodes in `gm`, topologically ordered; constants shared with the rest get a copy of their own."""
    names = set(temporal.nodes)
    inside = [n for n in gm.graph.nodes if n.name in names]
    members, features = set(inside), set(temporal.features)
    for node in reversed(inside):
        outside = [u for u in node.users if u not in members]
        if outside and node.name not in features:
            with gm.graph.inserting_after(node):
                twin = gm.graph.node_copy(node)
            for user in outside:
                user.replace_input_with(node, twin)
    return inside


def extract_temporal(gm: GraphModule, temporal: TemporalBlock) -> GraphModule:
    """The block alone: (timestep, ...) -> tuple of features, sharing parameters and submodules with `gm`."""
    block, _, outputs = fuse_as_graphmodule(gm, block_nodes(gm, temporal), BLOCK_NAME, always_return_tuple=True)
    assert tuple(n.name for n in outputs) == temporal.features, (outputs, temporal.features)
    return block


def partition_temporal(gm: GraphModule, *, temporal: TemporalBlock) -> PassResult:
    """Replace the block's flat nodes by one call_module. Bitwise unchanged.

        timestep -> n_1 -> .. -> f_i -> rest   ==>   timestep -> temporal_block -> getitem i -> rest
    """
    if BLOCK_NAME in gm._modules:
        return PassResult(gm, False)
    nodes = block_nodes(gm, temporal)
    block, inputs, outputs = fuse_as_graphmodule(gm, nodes, BLOCK_NAME, always_return_tuple=True)
    assert tuple(n.name for n in outputs) == temporal.features, (outputs, temporal.features)
    # The block needs nothing but inputs and constants, so it can run first, right after the placeholders.
    before = [*placeholders(gm).values(), *(n for n in inputs if n.op != "placeholder")]
    last = max(before, key=list(gm.graph.nodes).index)
    insert_subgm(gm, block, inputs, outputs, insertion_point=last)
    erase_nodes(gm, nodes)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)
