"""Choose the temporal features whose tables take fewer bytes than the layers that compute them. Nothing is rounded.

`maintain` weighs bytes against disturbance; here there is none, so the bytes decide alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.graph.inputs import conditioning_vectors, placeholders
from tfmq_fx.graph.nodes import dtype_of, meta_value, node_named, weight_argument
from tfmq_fx.maintenance.choice import CACHE, RECONSTRUCT, Option, choose, total_bytes
from tfmq_fx.maintenance.measuring import cached_bytes, needed_tensors
from tfmq_fx.maintenance.tables import float_block
from tfmq_fx.passes.quantize.cache_temporal import EXACT, feature_key, uncacheable
from tfmq_fx.passes.quantize.plan import Note, rows_are_samples
from tfmq_fx.passes.quantize.results import Decision, Maintenance
from tfmq_fx.passes.quantize.state import state_of, temporal_of
from tfmq_fx.passes.temporal.find_temporal import taint

COMPUTED, TABLE, REQUEST = "computed", "table", "request"


def paying(gm: GraphModule) -> Maintenance:
    """Decide for each temporal feature of a graph of `prepare_float`: "table", "request" or "computed".

    "table": its values at every value of its key stay in the network. "request": its values at every timestep, for one conditioning,
    are made when a request brings it. "computed": by the layers, as before, because neither takes fewer bytes than these, or
    neither can be made; `why` has the reason.

    `bytes` counts all features together: if all are computed, if all are tabled that can be, and as chosen. Only shapes are read, so
    the graph may be on the meta device.
    """
    state = state_of(gm)
    needs = dict(zip(state.features, needed_tensors(gm, float_block(gm)), strict=True))
    bar = {n: why for n in state.features if (why := barred(gm, n)) is not None}
    bar |= {n: "computing it takes no bytes" for n, tensors in needs.items() if not tensors}
    kinds = {n: TABLE if uncacheable(gm, n) is None else REQUEST for n in state.features if n not in bar}
    chosen, options = _cheapest(gm, needs, kinds)
    # A table over the product with other finite inputs may not pay, where one for each request does.
    again = {n for n, kind in kinds.items() if kind == TABLE and chosen[n] == COMPUTED and _conditions(gm, n)}
    if again:
        kinds |= dict.fromkeys(again, REQUEST)
        chosen, options = _cheapest(gm, needs, kinds)
    return Maintenance(
        bound=None,
        budget=None,
        cache_type=EXACT,
        features=tuple(
            _decision(gm, n, options[n], kinds.get(n), chosen[n], bar.get(n)) for n in state.features
        ),
        bytes={
            COMPUTED: total_bytes(options, dict.fromkeys(state.features, RECONSTRUCT)),
            TABLE: total_bytes(
                options, {n: CACHE if CACHE in o else RECONSTRUCT for n, o in options.items()}
            ),
            "chosen": total_bytes(
                options, {n: RECONSTRUCT if m == COMPUTED else CACHE for n, m in chosen.items()}
            ),
        },
        seconds_per_call={},
    )


def barred(gm: GraphModule, name: str) -> str | None:
    """Return why a feature can have no table of either kind, or None if it can."""
    node, state = node_named(gm, name), state_of(gm)
    timestep = meta_value(placeholders(gm)[state.timestep])
    value = meta_value(node)
    if isinstance(value, Tensor) and not value.is_floating_point():
        return f"its values are {str(value.dtype).removeprefix('torch.')}"
    if not rows_are_samples(node, timestep):
        return "its rows are not the samples of the batch"
    if uncacheable(gm, name) is None:
        return None
    if not isinstance(value, Tensor):
        return "its shape is not known in this graph; capture with tfmq_fx.capture"
    if isinstance(timestep, Tensor) and timestep.dim() == 0:
        return f"it depends on {', '.join(_conditions(gm, name))}, and the network takes one timestep for all samples; declare the values in finite="
    return None


def _cheapest(
    gm: GraphModule, needs: Mapping[str, Mapping[str, int]], kinds: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, dict[str, Option]]]:
    """Return the choice with the fewest bytes for each feature, and the options. kinds: of the table that each may have."""
    options = {}
    for name, tensors in needs.items():
        options[name] = {RECONSTRUCT: Option(tensors=tensors, distance=0.0)}
        if name in kinds:
            own = cached_bytes(gm, name, EXACT) if kinds[name] == TABLE else request_bytes(gm, name)
            options[name][CACHE] = Option(tensors=own, distance=0.0)
    found = choose(options, bound=math.inf)
    return {n: kinds[n] if m == CACHE else COMPUTED for n, m in found.items()}, options


def request_bytes(gm: GraphModule, name: str) -> dict[str, int]:
    """Return the bytes that a feature's values at every timestep take for one conditioning, by tensor."""
    node, state = node_named(gm, name), state_of(gm)
    width = math.prod(int(d) for d in meta_value(node).shape[1:])
    return {f"{name}: for one request": len(state.timesteps) * width * dtype_of(node).itemsize}


def _conditions(gm: GraphModule, name: str) -> list[str]:
    state = state_of(gm)
    return [n for n in state.inputs_of_feature(name) if n != state.timestep]


def _decision(
    gm: GraphModule,
    name: str,
    options: Mapping[str, Option],
    kind: str | None,
    chosen: str,
    reason: str | None,
) -> Decision:
    state = state_of(gm)
    layers, own = sum(options[RECONSTRUCT].tensors.values()), 0
    if kind is not None:
        own = sum(options[CACHE].tensors.values())
    size = {COMPUTED: layers, **({kind: own} if kind is not None else {})}
    words = {
        TABLE: f"{own} bytes in a table; its layers, some shared: {layers}",
        REQUEST: f"{own} bytes for a request; its layers, some shared: {layers}",
        COMPUTED: reason or f"{own} bytes for {len(state.timesteps)} timesteps are not fewer than its layers take: {layers}, some shared",
    }  # fmt: skip
    return Decision(
        feature=name,
        path=state.feature_paths[state.features.index(name)],
        key=feature_key(gm, name) if chosen == TABLE else state.inputs_of_feature(name),
        bytes=size,
        disturbance={},
        effect={},
        chosen=chosen,
        why=words[chosen],
    )


def mixed_layers(gm: GraphModule) -> list[Note]:
    """Return a note for each layer of one vector per sample that reads the timestep mixed with data: it stays computed.

        timestep -> .. -> add(., mean(tokens)) -> linear(., W)   ==>   W: reads encoder_hidden_states, which is data

    A noisy sample is not meant: every layer behind the features reads it.
    """
    state = state_of(gm)
    marks, inside = taint(gm), {state.timestep, *temporal_of(gm).keys}
    allowed = inside | {*conditioning_vectors(gm, state.timestep), *state.finite}
    noisy = next(n for n in placeholders(gm) if n not in allowed)
    found = []
    for node in gm.graph.nodes:
        mark = marks.get(node, frozenset())
        at = weight_argument(node)
        if at is None or state.timestep not in mark or noisy in mark or mark <= allowed:
            continue
        value, weight = meta_value(node), node.args[at]
        if isinstance(value, Tensor) and value.dim() <= 2 and isinstance(weight, Node):
            data = ", ".join(sorted(mark - allowed))
            reason = f"stays computed at every step: the timestep is mixed with {data}, which is data and no conditioning vector"
            found.append(Note(name=str(weight.target), reason=reason, coarser=False))
    return found
