"""Keep the float temporal block for keys that are not in the tables."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import aten, attribute, meta_value, set_buffer
from tfmq_fx.graph.state import set_state
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.quantize.cache_temporal import rename_layers, stand_for
from tfmq_fx.passes.quantize.plan import Note, rows_are_samples
from tfmq_fx.passes.quantize.state import require_stage, state_of, temporal_of
from tfmq_fx.passes.temporal.insert_step_index import for_each_entry, key_index
from tfmq_fx.passes.temporal.partition_temporal import separate

KNOWN = "_known"  # suffix of the nodes that test if a sample's value is in its table


@declare(needs=("prepare",), after=("calibrate", "reconstruct", "cache_temporal", "maintain"))
def float_at_unseen(gm: GraphModule, *, block: GraphModule) -> PassResult:
    """Use the float block's temporal features for samples whose timestep is not in the table.

        step -> .. -> f_i -> rest    ==>    where(timestep_known, f_i, float f_i) -> rest
                                            timestep_known = min |timestep_table - timestep| == 0

    If f_i depends on other finite inputs as well, their values must be in their tables, too.

    block: the float block, `extract_temporal` of the graph that was prepared. Its parameters are kept under their
        own names.

    Numerics: bitwise unchanged where every value is in its table; elsewhere a feature is bitwise the float
    block's. Scales per timestep outside the block are still those of the nearest neighbour.

    A graph with features from outside is left as it is: all of them come from there at such a timestep.

    The plan notes how many bytes the float block takes. A feature whose rows are not the samples of the batch
    is left quantized, and noted as coarser. Raises TFMQError for a block with other features, and for one that
    needs an input which is not in the graph.
    """
    state = require_stage(gm, "calibrated", "reconstructed")
    if state.outside:
        return PassResult(gm, False)
    nodes = {n.name: n for n in gm.graph.nodes}
    if f"{state.timestep}{KNOWN}" in nodes:
        return PassResult(gm, False)
    features = state.features
    outputs = block.graph.output_node().args[0]
    inputs = placeholders(gm)
    if not isinstance(outputs, (tuple, list)) or len(outputs) != len(features):
        raise TFMQError(
            f"block: does not return the {len(features)} temporal features of the graph; pass extract_temporal of the graph "
            "that was prepared."
        )
    missing = [name for name in placeholders(block) if name not in inputs]
    if missing:
        raise TFMQError(
            f"block: needs {missing[0]}, which is not an input of the graph ({', '.join(inputs)})."
        )
    inside = set(separate(gm, temporal_of(gm)))
    twins = _copied(gm, block)
    known = _known(gm)
    timestep = meta_value(inputs[state.timestep])
    kept = sum(attribute(block, str(n.target)).nbytes for n in block.graph.find_nodes(op="get_attr"))
    reason = f"the float temporal block stays for values outside the table: {kept} bytes"
    renamed, notes = {}, [Note(name=state.timestep, reason=reason, coarser=False)]
    for name, key, twin in zip(features, state.feature_keys, outputs, strict=True):
        node = nodes[name]
        if not rows_are_samples(node, timestep):
            notes.append(
                Note(
                    name=name,
                    reason="quantized at unseen timesteps: its rows are not the samples of the batch",
                )
            )
            continue
        with gm.graph.inserting_before(node.next):
            new = _chosen(gm, [known[n] for n in key if n in known], node, twins[twin])
        renamed[name] = stand_for(node, new, block=inside)
    rename_layers(gm, renamed)
    set_state(gm, state_of(gm).with_notes(*notes))
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


def _copied(gm: GraphModule, block: GraphModule) -> dict[Node, Node]:
    """Copy the block to the front of `gm`, after its inputs; return the block's nodes -> their copies."""
    inputs = placeholders(gm)
    twins = {node: inputs[name] for name, node in placeholders(block).items()}
    restored = set()
    with gm.graph.inserting_before(list(inputs.values())[-1].next):
        for node in block.graph.nodes:
            if node.op == "output" or node in twins:
                continue
            if node.op == "call_module":
                raise TFMQError(f"block: node {node.name} calls a module; run inline_modules before prepare.")
            if node.op == "get_attr" and _restore(gm, block, str(node.target)):
                restored.add(str(node.target))
            twins[node] = gm.graph.node_copy(node, twins.__getitem__)
    state = state_of(gm)
    removed = tuple(path for path in state.removed if path not in restored)
    set_state(gm, dataclasses.replace(state, removed=removed))
    return twins


def _restore(gm: GraphModule, block: GraphModule, path: str) -> bool:
    """Put the block's tensor at `path` of `gm`. Return False if it is there already."""
    value = attribute(block, path)
    try:
        found = attribute(gm, path)
    except AttributeError:
        set_buffer(gm, path, value.detach())
        return True
    if not torch.equal(found, value):
        raise TFMQError(
            f"block: {path} has different values in the graph; pass extract_temporal of the graph that was prepared."
        )
    return False


def _known(gm: GraphModule) -> dict[str, Node]:
    """Return, for each finite input, a node that tests if a sample's value is in its table.

    It is bool, of shape (N,), or (1,) for an input of shape (); (N * tokens,) if a timestep has an entry for each token.
    """
    call, state, found = gm.graph.call_function, state_of(gm), {}
    for name in state.sizes:
        index = key_index(gm, (name,), timestep=state.timestep, sizes=state.sizes)
        with gm.graph.inserting_before(index):
            least = call(aten.amin.default, (index.args[0], [1]))
            known = call(aten.eq.Scalar, (least, 0))
        found[name] = known
        if name != state.timestep:
            found[name] = for_each_entry(gm, known, timestep=state.timestep, after=known)
        found[name].name = f"{name}{KNOWN}"
    return found


def _chosen(gm: GraphModule, known: list[Node], layer: Node, twin: Node) -> Node:
    """Insert where(all of known, layer, twin), row by row."""
    call, mask = gm.graph.call_function, known[0]
    for other in known[1:]:
        mask = call(aten.logical_and.default, (mask, other))
    dims = meta_value(layer).dim()
    if dims != 1:
        mask = call(aten.reshape.default, (mask, [-1] + [1] * (dims - 1) if dims else []))
    return call(aten.where.self, (mask, layer, twin))
