"""Make other forms of a network whose temporal block is outside: with the block in it, or with every feature as an input."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.outside import Outside
from tfmq_fx.base.arithmetic import NETWORK_DTYPES
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import attribute, fresh, put_in_place, set_buffer, set_parameter
from tfmq_fx.passes.quantize.cache_temporal import ROOT
from tfmq_fx.passes.temporal.partition_temporal import BLOCK_NAME, temporal_block_of


def closed_graph(
    network: GraphModule, outside: Outside, device: torch.device, *, taken: Sequence[str]
) -> GraphModule:
    """Return a graph on a device that computes the features which are its inputs, `taken`, by the block.

    y, f_i -> rest   ==>   y -> block -> getitem i -> rest
    """
    gm, block = fresh(network), outside.block_on(device)
    inputs = placeholders(gm)
    last = next(n for n in reversed(inputs.values()) if n.target not in taken)
    with gm.graph.inserting_before(last.next):
        features = dict(zip(outside.features, _copied(gm, block, inputs), strict=True))
    for name in taken:
        features[name].meta = dict(inputs[name].meta)
        inputs[name].replace_all_uses_with(features[name])
        gm.graph.erase_node(inputs[name])
    gm.graph.eliminate_dead_code()  # the features that it has
    gm.graph.lint()
    gm.recompile()
    return gm


def without_module(network: GraphModule) -> GraphModule:
    """Return a graph whose temporal block is not a module of its own, with its tensors beside the others."""
    gm = fresh(network)
    for call in gm.graph.find_nodes(op="call_module", target=BLOCK_NAME):
        block = temporal_block_of(gm)
        given = dict(zip(placeholders(block), call.args, strict=True))
        with gm.graph.inserting_before(call):
            outputs = _copied(gm, block, given)
        put_in_place(call, outputs)
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return gm


def float_graph(gm: GraphModule, *, tables: Collection[str]) -> GraphModule:
    """Let a flat graph be a float network, in place: its weights are parameters, and its tables have names of their own.

    tables: paths that a later look-up would take.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        value = attribute(gm, path).detach()
        if path in tables or path.startswith(f"{ROOT}."):
            node.target = f"precomputed.{path}"
            set_buffer(gm, node.target, value)
        elif value.dtype in NETWORK_DTYPES:
            set_parameter(gm, path, value)
    found = GraphModule(gm, gm.graph)
    found.meta = {}
    return found.eval()


def _copied(gm: GraphModule, block: GraphModule, given: Mapping[str, Node]) -> list[Node]:
    """Copy a block's nodes and tensors into a graph, at its insertion point. Return what the block returns."""
    inner = {node: given[name] for name, node in placeholders(block).items()}
    outputs: Any = gm.graph.graph_copy(block.graph, inner)
    for path, value in tensors_of(block).items():
        set_buffer(gm, path, value)
    return list(outputs)


def opened_graph(network: GraphModule, features: Sequence[str]) -> GraphModule:
    """Return a partitioned graph with all features as inputs, in this order, after its own inputs.

    Those that its block has are no longer read.
    """
    gm = fresh(network)
    given = placeholders(gm)
    last = next(n for n in reversed(given.values()) if n.target not in features)
    calls = gm.graph.find_nodes(op="call_module", target=BLOCK_NAME)
    names = [n.name for n in _returned(temporal_block_of(gm))] if calls else []
    items = {names[n.args[1]]: n for call in calls for n in call.users}
    for name in features:
        if name in given:
            last.append(given[name])
            last = given[name]
            continue
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(name)
        last.target = last.name  # the source that fx writes assigns one to the other
        if name in items:
            last.meta = dict(items[name].meta)
            items[name].replace_all_uses_with(last)
            gm.graph.erase_node(items[name])
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def _returned(block: GraphModule) -> list[Node]:
    outputs: Any = block.graph.output_node().args[0]
    return list(outputs)
