"""Find and compute what a graph computes from its parameters, buffers and numbers alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tfmq_fx.graph.nodes import ancestors, attribute, is_random, mutated_inputs, viewed_inputs


def constants(gm: GraphModule) -> set[Node]:
    """Return the nodes whose tensors are the same in every call: parameters, buffers, and functions of them.

    Random numbers, and memory that any node writes, are not among them.
    """
    changing, found = _written(gm), set[Node]()
    for node in gm.graph.nodes:
        if node in changing or is_random(node) or mutated_inputs(node):
            continue
        if node.op == "get_attr":
            if isinstance(attribute(gm, str(node.target)), Tensor):
                found.add(node)
        elif node.op == "call_function" and node.all_input_nodes and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _written(gm: GraphModule) -> set[Node]:
    """Return the nodes whose memory some node writes in place."""
    owners: dict[Node, object] = {}  # a constant is the same memory wherever the graph reads it
    for node in gm.graph.nodes:
        viewed = viewed_inputs(node)
        owners[node] = owners[viewed[0]] if viewed else node.target if node.op == "get_attr" else node
    written = {owners[target] for node in gm.graph.nodes for target in mutated_inputs(node)}
    return {node for node, owner in owners.items() if owner in written}


def values_of(gm: GraphModule, nodes: Iterable[Node]) -> dict[Node, Any]:
    """Return the values of these nodes of `constants`, computed as the graph does.

    One after the other, so that memory holds what leads to a single one of them.
    """
    return {node: _value(gm, node) for node in nodes}


@torch.no_grad()
def _value(gm: GraphModule, wanted: Node) -> Any:
    needed, values = ancestors([wanted]), dict[Node, Any]()
    for node in (n for n in gm.graph.nodes if n in needed):
        if node.op == "get_attr":
            values[node] = attribute(gm, str(node.target))
        else:
            assert callable(node.target)
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values[wanted]


def parameters_under(gm: GraphModule, node: Node) -> list[str]:
    """Return the paths of the parameters, buffers not, that a constant is computed from, in the graph's order."""
    above = ancestors([node])
    found = [str(n.target) for n in gm.graph.nodes if n in above and n.op == "get_attr"]
    return [p for p in dict.fromkeys(found) if isinstance(attribute(gm, p), torch.nn.Parameter)]
