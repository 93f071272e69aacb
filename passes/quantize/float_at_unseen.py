"""Keep the float temporal block for keys that the tables lack."""

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
from tfmq_fx.passes.temporal.insert_step_index import key_index
from tfmq_fx.passes.temporal.partition_temporal import separate

KNOWN = "_known"  # how the names of the nodes end that say whether a sample's value is in its table


@declare(needs=("prepare",), after=("calibrate", "reconstruct", "cache_temporal", "maintain"))
def float_at_unseen(gm: GraphModule, *, block: GraphModule) -> PassResult:
    """Take a sample's temporal features from the float block where its timestep is not in the table.

        step -> .. -> f_i -> rest    ==>    where(timestep_known, f_i, float f_i) -> rest
                                            timestep_known = min |timestep_table - timestep| == 0

    Where f_i is a function of other finite inputs as well, they have to be known, too.

    block: the float block, `extract_temporal` of the graph that was prepared. Its parameters stay, under their own names.

    Numerics: bitwise unchanged where every value is in its table; elsewhere a feature is bitwise the float block's. Scales
    per timestep outside the block remain those of the nearest neighbour.

    The plan notes the bytes, and as coarser a feature that stays as it is, its rows not being the batch. Raises TFMQError for a
    block with other features, or one that needs more than its keys.
    """
    state = require_stage(gm, "calibrated", "reconstructed")
    nodes = {n.name: n for n in gm.graph.nodes}
    if f"{state.timestep}{KNOWN}" in nodes:
        return PassResult(gm, False)
    features = state.features
    outputs = block.graph.output_node().args[0]
    inputs = placeholders(gm)
    if not isinstance(outputs, (tuple, list)) or len(outputs) != len(features):
        raise TFMQError(f"block: it does not give the {len(features)} temporal features of the graph.")
    missing = [name for name in placeholders(block) if name not in inputs]
    if missing:
        raise TFMQError(
            f"block: it needs {missing[0]}, which is no input of the graph ({', '.join(inputs)})."
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
            notes.append(Note(name=name, reason="quantized at unseen timesteps: its rows are not the batch"))
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
    """The block's nodes and their twins, which are put before everything that `gm` computes."""
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
    """Put the block's tensor at `path` of `gm`; False when it is there."""
    value = attribute(block, path)
    try:
        found = attribute(gm, path)
    except AttributeError:
        set_buffer(gm, path, value.detach())
        return True
    if not torch.equal(found, value):
        raise TFMQError(
            f"block: {path} has other values than in the graph; give the block of the graph that was prepared."
        )
    return False


def _known(gm: GraphModule) -> dict[str, Node]:
    """For each finite input, whether a sample's value is in its table: (N,) bool, (1,) for an input of shape ()."""
    call, state, found = gm.graph.call_function, state_of(gm), {}
    for name in state.sizes:
        index = key_index(gm, (name,), timestep=state.timestep, sizes=state.sizes)
        with gm.graph.inserting_before(index):
            least = call(aten.amin.default, (index.args[0], [1]))
            found[name] = call(aten.eq.Scalar, (least, 0))
        found[name].name = f"{name}{KNOWN}"
    return found


def _chosen(gm: GraphModule, known: list[Node], layer: Node, twin: Node) -> Node:
    """where(all of known, layer, twin), rows by rows."""
    call, mask = gm.graph.call_function, known[0]
    for other in known[1:]:
        mask = call(aten.logical_and.default, (mask, other))
    dims = meta_value(layer).dim()
    if dims != 1:
        mask = call(aten.reshape.default, (mask, [-1] + [1] * (dims - 1) if dims else []))
    return call(aten.where.self, (mask, layer, twin))
