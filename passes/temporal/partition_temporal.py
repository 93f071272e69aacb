"""Make the temporal block a submodule whose outputs are the temporal features."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.utils.fuser_utils import erase_nodes, fuse_as_graphmodule

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import ancestors, is_view_or_pointwise
from tfmq_fx.passes.pass_manager import CLEANING, declare
from tfmq_fx.passes.temporal.find_temporal import (
    TemporalBlock,
    find_temporal,
    overwritten,
    require_no_early_reads,
    taint,
)

BLOCK_NAME = "temporal_block"


def temporal_block_of(gm: GraphModule) -> GraphModule:
    """Return the temporal block of a partitioned graph: timestep (N,), and what joins it -> the temporal features."""
    block = gm.get_submodule(BLOCK_NAME)
    assert isinstance(block, GraphModule)
    return block


def separate(gm: GraphModule, temporal: TemporalBlock) -> list[Node]:
    """Return the block's nodes, after separating them from the rest of the graph. Bitwise unchanged.

    Cheap nodes (views, pointwise operators and constants) that the rest reads too are copied for it.
    """
    names = set(temporal.nodes)
    inside = [n for n in gm.graph.nodes if n.name in names]
    members = set(inside)
    marks, written = taint(gm), overwritten(gm, members)
    for node in reversed(inside):
        outside = [u for u in node.users if u not in members]
        cheap = not marks[node] or is_view_or_pointwise(node)
        if outside and node.name not in temporal.features and cheap and node not in written:
            with gm.graph.inserting_after(node):
                twin = gm.graph.node_copy(node)
            for user in outside:
                user.replace_input_with(node, twin)
    return inside


def _fuse(
    gm: GraphModule, temporal: TemporalBlock
) -> tuple[GraphModule, list[Node], tuple[Node, ...], list[Node]]:
    """Return the block as a module, and its nodes, inputs and outputs in `gm`: features, then other values.

    A constant that the rest of the graph uses too is copied for it, and so is a view of a feature that
    another layer of the block reads as well. Any other value that the rest uses and that is not a feature
    (the step index) becomes a further output, so that it is computed once.
    """
    features = temporal.features
    inside = separate(gm, temporal)
    members = set(inside)
    require_no_early_reads(gm, members)
    outer = {n for node in inside for n in node.all_input_nodes if n not in members}
    for node in outer:
        if node.op != "placeholder" and ancestors([node]) & members:
            raise TFMQError(
                f"node {node.name}: the temporal block needs the shape of this value, which is computed from the block itself; "
                "capture with torch.export (tfmq_fx.capture), which reads the batch size from the timestep."
            )
    block, inputs, outputs = fuse_as_graphmodule(gm, inside, BLOCK_NAME, always_return_tuple=True)
    for inner, node in zip(block.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if node.op == "placeholder":
            inner.target = node.target  # an input keeps its name, which may differ from its node's
    returned = dict(zip(outputs, block.graph.output_node().args[0], strict=True))  # type: ignore[arg-type]
    assert set(features) <= {n.name for n in outputs}, (features, outputs)
    ordered = sorted(outputs, key=lambda n: features.index(n.name) if n.name in features else len(features))
    block.graph.output_node().args = (tuple(returned[n] for n in ordered),)
    block.recompile()
    return block, inside, inputs, ordered


def extract_temporal(gm: GraphModule, temporal: TemporalBlock) -> GraphModule:
    """Return the block alone, from its inputs (`temporal.keys`) to a tuple of features.

    It shares parameters and submodules with `gm`.
    """
    block, *_ = _fuse(gm, temporal)
    output = block.graph.output_node()
    output.args = (output.args[0][: len(temporal.features)],)  # type: ignore[index]
    block.recompile()
    return block


@declare(after=(*CLEANING, "prepare"))
def partition_temporal(gm: GraphModule, *, temporal: TemporalBlock | None = None) -> PassResult:
    """Replace the block's flat nodes by one call_module. Bitwise unchanged.

        timestep -> n_1 -> .. -> f_i -> rest   ==>   timestep -> temporal_block -> getitem i -> rest

    temporal: what `find_temporal` found; None finds it here. Nothing changes for one without features. Raises
        TFMQError if the block cannot stand alone.
    """
    if BLOCK_NAME in gm._modules:
        return PassResult(gm, False)
    temporal = temporal or find_temporal(gm)
    if not temporal.features:
        return PassResult(gm, False)
    block, nodes, inputs, outputs = _fuse(gm, temporal)
    # The block needs only inputs and constants, so it can run first, right after the placeholders.
    before = [*placeholders(gm).values(), *(n for n in inputs if n.op != "placeholder")]
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    last = max(before, key=order.__getitem__)
    gm.add_submodule(BLOCK_NAME, block)
    with gm.graph.inserting_before(last.next):
        call = gm.graph.call_module(BLOCK_NAME, inputs)
        items = [gm.graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
    for node, item in zip(outputs, items, strict=True):
        item.meta = dict(node.meta)
        node.replace_all_uses_with(item)
    erase_nodes(gm, nodes)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)
