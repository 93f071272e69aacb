"""Find the Temporal Information Block by dataflow from the `timestep` input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import conditioning_vectors, placeholders, require_input, timestep_input
from tfmq_fx.graph.nodes import (
    ancestors,
    count,
    fixed_size,
    is_random,
    is_view_or_pointwise,
    meta_value,
    mutated_inputs,
    op_name,
    value_inputs,
    viewed_inputs,
    weight_argument,
)


@dataclass(frozen=True, kw_only=True)
class TemporalBlock:
    """The nodes that depend only on the timestep, conditioning vectors and parameters.

    This is the Temporal Information Block of TFMQ-DM. It holds node names, so it survives copies. Invariants:
    `features` is a non-empty subset of `nodes`; no node of `nodes` depends on a value outside `keys`,
    parameters and constants; `timestep` is in every feature's keys.
    """

    timestep: str  # name of the graph input that carries the timestep
    nodes: tuple[str, ...]  # the block in topological order, with constants that only it uses
    features: tuple[str, ...]  # the temporal features g_i(h(t)), in topological order
    keys: tuple[str, ...]  # the graph inputs the block is a function of, timestep first
    feature_keys: tuple[tuple[str, ...], ...]  # for each feature, the inputs it is a function of


def taint(gm: GraphModule) -> dict[Node, frozenset[str]]:
    """Return, for each node, the graph inputs whose *values* reach it.

    A use of a tensor's shape, dtype or device carries no value, nor does an input that is a size. Random
    operators add a mark of their own. An in-place operator marks everything that may share the memory it
    writes.
    """
    return _flow(gm).marks


@dataclass(frozen=True)
class _Flow:
    marks: dict[Node, frozenset[str]]  # see `taint`
    storage: dict[Node, Node]  # node -> the node that owns the memory it may share
    writers: dict[Node, list[Node]]  # node -> the nodes that wrote in place to the memory it reads, before it


def _flow(gm: GraphModule) -> _Flow:
    marks: dict[Node, frozenset[str]] = {}
    storage: dict[Node, Node] = {}
    writes: dict[Node, list[Node]] = {}  # owner -> its writers so far
    writers: dict[Node, list[Node]] = {}
    written: dict[Node, frozenset[str]] = {}  # owner -> marks written in place so far
    for node in gm.graph.nodes:
        mark: frozenset[str] = frozenset()
        if node.op == "placeholder" and not isinstance(meta_value(node), torch.SymInt):
            mark = frozenset([str(node.target)])
        sources = value_inputs(node)
        if writes and (before := [w for source in sources for w in writes.get(storage[source], ())]):
            writers[node] = before
        for source in sources:
            mark |= marks[source] | written.get(storage[source], frozenset())
        if is_random(node):
            mark |= {f"random:{node.name}"}
        viewed = viewed_inputs(node)
        storage[node] = storage[viewed[0]] if viewed else node
        for target in mutated_inputs(node):
            owner = storage[target]
            written[owner] = written.get(owner, frozenset()) | mark
            writes.setdefault(owner, []).append(node)
        marks[node] = mark
    return _Flow(marks, storage, writers)


def overwritten(gm: GraphModule, inside: set[Node]) -> set[Node]:
    """Return the nodes whose memory a node of `inside` writes: their values depend on when they are read."""
    if not any(mutated_inputs(n) for n in inside):
        return set()
    storage = _flow(gm).storage
    owners = {storage[target] for n in inside for target in mutated_inputs(n)}
    return {n for n, owner in storage.items() if owner in owners}


def require_no_early_reads(gm: GraphModule, inside: set[Node]) -> None:
    """Raise TFMQError, naming both nodes, if one inside writes to memory that one outside reads earlier.

    The block is moved to the front of the graph, so it would write first.
    """
    if not any(mutated_inputs(n) for n in inside):
        return
    storage = _flow(gm).storage
    read: dict[Node, Node] = {}  # owner of memory -> the first node outside that reads it
    for node in gm.graph.nodes:
        if node not in inside:
            for source in value_inputs(node):
                read.setdefault(storage[source], node)
            continue
        for target in mutated_inputs(node):
            if storage[target] in read:
                raise TFMQError(
                    f"node {node.name}: the temporal block writes in place to memory that node {read[storage[target]].name} outside it "
                    "reads earlier; functionalise the graph (ExportedProgram.run_decompositions({})) or write to a new tensor."
                )


def find_temporal(
    gm: GraphModule,
    *,
    timestep: str | None = None,
    conditioning: Iterable[str] | None = None,
    finite: Iterable[str] = (),
    features: tuple[str, ...] | None = None,
) -> TemporalBlock:
    """Find the temporal block of a graph, which is only read.

        timestep -> sinusoid -> linear -> silu -> linear -> silu -> linear_i -> view -> add(conv, .)
                    `------------------- the block ------------------------'
                                                    feature i ---^

    A *feature* is the weighted layer whose output, through views, pointwise operators and choices that the
    timestep does not make, first meets a value that depends on data: on anything but the timestep, conditioning
    and parameters. Numbers by which a sampler scales the data, one per sample and computed without a layer, are not
    features: they stay where they are, in float. They are where nothing else meets data.

    timestep: the input's name; None takes what capture recorded, "timestep", or the only input that can be it.
    conditioning: inputs that may join the timestep inside the block (class labels, pooled text, size ids,
        guidance); () for the part that depends on the timestep alone. None takes every input that is one vector
        or number per sample, see `conditioning_vectors`.
    finite: further inputs that may join it, those with finitely many values.
    features: the names of the features, if an earlier call on the float graph found them; observers and
        lookups that were inserted since are then not mistaken for features.

    Raises TFMQError when the graph has no input of that name, when the timestep was baked in as a constant,
    when only its shape is used, when it does not reach the output, and when it meets data before any layer.
    """
    source = timestep_input(gm, timestep)
    allowed = _allowed(gm, str(source.target), conditioning, finite)
    flow = _flow(gm)
    _require_path(gm, source, flow.marks)
    inside = {
        n for n, mark in flow.marks.items() if mark <= allowed and n.op not in ("placeholder", "output")
    }
    temporal = {n for n in inside if source.target in flow.marks[n]}
    frontier = _frontier(gm, flow, temporal, allowed)
    if not frontier:
        raise TFMQError(
            f"timestep={source.target!r}: no temporal block found; no value computed from "
            f"{' and '.join(sorted(allowed))} alone reaches the output. Inputs are {', '.join(placeholders(gm))}."
        )
    if features is None:
        written = overwritten(gm, temporal)
        anchors = {anchor for node in frontier for anchor in _anchors(node, temporal, written)}
        anchors = {n for n in anchors if not _is_scalar_without_layer(n, source, inside)} or anchors
    else:
        anchors = {n for n in temporal if n.name in features}
    return _block(gm, flow, str(source.target), anchors=anchors, inside=inside, allowed=allowed)


def _allowed(
    gm: GraphModule, timestep: str, conditioning: Iterable[str] | None, finite: Iterable[str]
) -> set[str]:
    """Return the inputs that the block may be a function of. Raises TFMQError for one that the graph does not have."""
    for argument, names in (("conditioning", conditioning or ()), ("finite", finite)):
        for name in names:
            require_input(gm, name, argument=argument)
    vectors = conditioning_vectors(gm, timestep) if conditioning is None else conditioning
    return {timestep, *vectors, *finite}


def _frontier(gm: GraphModule, flow: _Flow, temporal: set[Node], allowed: set[str]) -> list[Node]:
    """Return the nodes of the block that something outside it reads, on the way to the output."""
    alive = ancestors([gm.graph.output_node()], flow.writers)
    outside = {n for n in alive if not flow.marks[n] <= allowed}
    return [
        node
        for node in gm.graph.nodes
        if node in temporal and any(u in outside and node in value_inputs(u) for u in node.users)
    ]


def _block(
    gm: GraphModule, flow: _Flow, timestep: str, *, anchors: set[Node], inside: set[Node], allowed: set[str]
) -> TemporalBlock:
    """Return the block whose features are the anchors; inside: the nodes that depend on `allowed` alone."""
    marks = flow.marks
    constant = constants_of(gm, marks, allowed)
    members = {n for n in ancestors(anchors, flow.writers) if (n in inside and marks[n]) or n in constant}
    order = [n for n in gm.graph.nodes if n in members]
    found = [n for n in order if n in anchors]
    names = [timestep, *(n for n in placeholders(gm) if n != timestep)]
    feature_keys = [tuple(n for n in names if n in marks[f]) for f in found]
    return TemporalBlock(
        timestep=timestep,
        nodes=tuple(n.name for n in order),
        features=tuple(n.name for n in found),
        keys=tuple(n for n in names if any(n in keys for keys in feature_keys)),
        feature_keys=tuple(feature_keys),
    )


def _require_path(gm: GraphModule, source: Node, marks: dict[Node, frozenset[str]]) -> None:
    """Raise TFMQError for a timestep whose value does not reach the output, saying where it gets lost."""
    name = str(source.target)
    if not source.users:
        raise TFMQError(
            f"timestep={name!r}: nothing in the graph uses this input, so its value was baked in as a constant. "
            "Capture with a tensor timestep, not a Python number."
        )
    if name in marks[gm.graph.output_node()]:
        return
    reached = [n for n in gm.graph.nodes if name in marks[n] and n is not source]
    if not reached:
        raise TFMQError(
            f"timestep={name!r}: only its shape, dtype or device is used (by node {next(iter(source.users)).name}), never "
            "its value: the network computes the same at every timestep."
        )
    raise TFMQError(
        f"timestep={name!r}: does not reach the output; its last use is node {reached[-1].name}, whose result is dropped."
    )


def _anchors(node: Node, temporal: set[Node], written: set[Node]) -> set[Node]:
    """Return the nodes that reach `node` by views, pointwise operators and choices alone, usually embedding layers.

    The walk back stops at memory that is written in place, because its value cannot be recomputed outside.
    """
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        sources = [n for n in value_inputs(current) if n in temporal]
        passed = is_view_or_pointwise(current) or _chooses(current, temporal)
        if sources and passed and current not in written:
            stack.extend(sources)
        else:
            found.add(current)
    return found


def _chooses(node: Node, temporal: set[Node]) -> bool:
    """Return True for a choice between values that the timestep does not make, such as one for each token."""
    return op_name(node) == "where" and node.args[0] not in temporal


def _is_scalar_without_layer(node: Node, timestep: Node, inside: set[Node]) -> bool:
    """Return True for one number per timestep that no weighted layer computes, such as a sampler's 1 / (1 + sigma ** 2)."""
    value, t = meta_value(node), meta_value(timestep)
    if not isinstance(value, Tensor):
        return False
    by_entry = isinstance(t, Tensor) and t.dim() > 1 and count(value.shape) == count(t.shape)
    if not by_entry and any(fixed_size(size) != 1 for size in value.shape[1:]):
        return False
    return not any(weight_argument(n) is not None for n in ancestors([node]) & inside)


def constants_of(gm: GraphModule, marks: dict[Node, frozenset[str]], inputs: Iterable[str]) -> set[Node]:
    """Return parameters, buffers and arithmetic on them.

    Shape queries count if the shape is that of one of the named inputs, or of a value computed from these
    alone.
    """
    inputs = set(inputs)
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or marks[node]:
            continue
        if all(n in found or (marks[n] and marks[n] <= inputs) for n in node.all_input_nodes):
            found.add(node)
    return found
