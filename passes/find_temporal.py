"""Find the Temporal Information Block by dataflow from the `timestep` input."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import (
    ancestors,
    is_random,
    is_view_or_pointwise,
    mutated_inputs,
    placeholders,
    require_input,
    value_inputs,
    viewed_inputs,
)


@dataclass(frozen=True, kw_only=True)
class TemporalBlock:
    """What depends on the timestep and parameters only (TFMQ-DM, Temporal Information Block). Node names, so it survives copies.

    Invariants: `features` is a non-empty subset of `nodes`; no node of `nodes` depends on a value outside
    `keys`, parameters and constants.
    """

    timestep: str  # name of the graph input that carries the timestep
    nodes: tuple[str, ...]  # the block, in topological order, constants it alone uses included
    features: tuple[str, ...]  # the temporal features g_i(h(t)), in topological order
    keys: tuple[str, ...]  # the graph inputs the features are functions of


def taint(gm: GraphModule) -> dict[Node, frozenset[str]]:
    """For each node, the graph inputs whose *values* reach it.

    A use of a tensor's shape, dtype or device carries nothing; random operators add a mark of their own; an
    in-place operator marks whatever may share the memory it writes.
    """
    marks: dict[Node, frozenset[str]] = {}
    storage: dict[Node, Node] = {}  # node -> the node that owns the memory it may share
    written: dict[Node, frozenset[str]] = {}  # owner -> marks written in place so far
    for node in gm.graph.nodes:
        mark: frozenset[str] = frozenset()
        if node.op == "placeholder":
            mark = frozenset([str(node.target)])
        for source in value_inputs(node):
            mark |= marks[source] | written.get(storage[source], frozenset())
        if is_random(node):
            mark |= {f"random:{node.name}"}
        viewed = viewed_inputs(node)
        storage[node] = storage[viewed[0]] if viewed else node
        for target in mutated_inputs(node):
            owner = storage[target]
            written[owner] = written.get(owner, frozenset()) | mark
        marks[node] = mark
    return marks


def find_temporal(
    gm: GraphModule, *, timestep: str = "timestep", features: tuple[str, ...] | None = None
) -> TemporalBlock:
    """The temporal block of a captured graph; the graph is only read.

        timestep -> sinusoid -> linear -> silu -> linear -> silu -> linear_i -> view -> add(conv, .)
                    `------------------- the block ------------------------'
                                                    feature i ---^

    A *feature* is the weighted layer whose output, through views and pointwise operators, first meets a value
    that depends on anything but the timestep and parameters.

    features: the names of the features when they are known from an earlier find on the float graph; observers and
    lookups that came in between are then not mistaken for features.

    Raises TFMQError when the graph has no input of that name, when it was baked in as a constant, when only
    its shape is used, or when no temporal feature reaches the output.
    """
    source = require_input(gm, timestep)
    if not source.users:
        raise TFMQError(
            f"timestep={timestep!r}: nothing in the graph uses this input, so its value was baked in as a constant. "
            "Capture with a tensor timestep, not a Python number."
        )
    marks = taint(gm)
    alone = frozenset([timestep])
    temporal = {n for n, mark in marks.items() if mark == alone and n is not source}
    alive = ancestors([gm.graph.output_node()])
    frontier = [
        node
        for node in gm.graph.nodes
        if node in temporal
        and any(u in alive and marks[u] != alone and node in value_inputs(u) for u in node.users)
    ]
    if not frontier:
        raise TFMQError(
            f"timestep={timestep!r}: no temporal block found; no value computed from this input alone reaches the "
            f"output. Inputs are {', '.join(placeholders(gm))}."
        )
    anchors: set[Node] = set()
    if features is None:
        for node in frontier:
            anchors |= _anchors(node, temporal) or {node}
    else:
        anchors = {n for n in temporal if n.name in features}
    constant = constants_of(gm, marks, timestep)
    inside = {n for n in ancestors(anchors) if n in temporal or n in constant}
    order = [n for n in gm.graph.nodes if n in inside]
    return TemporalBlock(
        timestep=timestep,
        nodes=tuple(n.name for n in order),
        features=tuple(n.name for n in order if n in anchors),
        keys=(timestep,),
    )


def _anchors(node: Node, temporal: set[Node]) -> set[Node]:
    """What `node` is computed from by views and pointwise operators alone: embedding layers, as a rule."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_view_or_pointwise(current):
            stack.extend(n for n in value_inputs(current) if n in temporal)
        else:
            found.add(current)
    return found


def constants_of(gm: GraphModule, marks: dict[Node, frozenset[str]], timestep: str) -> set[Node]:
    """Parameters, buffers and arithmetic on them; shape queries count when the shape is the timestep's own."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op != "placeholder" and not marks[node]:
            inputs = node.all_input_nodes
            if all(n in found or n.target == timestep for n in inputs):
                found.add(node)
    return found
