"""Measure, choose and set the maintenance of each temporal feature: the quantized block, or a table.

The two ways and the choice between them come from *Temporal Feature Matters* (arXiv 2407.19547): TIB-based and
cache-based maintenance, disturbance-aware selection. Its full text was not available, so the measures and rules are
our own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from tfmq_fx.base.ambient import neutral
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.graph.state import set_state
from tfmq_fx.graph.written import keeps_buffers
from tfmq_fx.maintenance.choice import CACHE, RECONSTRUCT, Option, choose, total_bytes
from tfmq_fx.maintenance.measuring import (
    cached_bytes,
    converted_block,
    measured_options,
    needed_tensors,
    seconds_per_call,
)
from tfmq_fx.maintenance.paying import REQUEST, barred, request_bytes
from tfmq_fx.maintenance.tables import feature_tables
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.quantize.cache_temporal import ROOT, cache_temporal, feature_key, uncacheable
from tfmq_fx.passes.quantize.open_temporal import open_temporal
from tfmq_fx.passes.quantize.plan import Note
from tfmq_fx.passes.quantize.results import Decision, Maintenance
from tfmq_fx.passes.quantize.state import require_stage, state_of


@declare(needs=("calibrate",), after=("reconstruct",))
@neutral()
@keeps_buffers
@torch.no_grad()
def maintain(gm: GraphModule, calibration: CalibrationSet, *, seed: int = 0) -> GraphModule:
    """Set the maintenance of each temporal feature of a calibrated graph, in place, by `recipe.maintain`.

    "reconstruct": do nothing.
    "cache": look up every feature in a table of its float values, except features that use no weights. A feature that depends on an
        input which is not finite becomes an input of the graph (`open_temporal`): what holds the graph computes it for each request.
    "auto": let `choose` take one of the two for each feature. Disturbance is measured on the feature (all keys) and
        on the network's output (`EFFECT_ROWS` rows, with only this feature quantized). The plan notes each feature
        that stays over the bound, because no option or the budget allows less.

    The graph's state has the decisions, the bytes and the seconds per call (`state_of(gm).maintenance`). Raises
    TFMQError for a budget that is too small, and for "cache" if a feature can have no table of either kind, naming it.
    """
    state = require_stage(gm, "calibrated", "reconstructed")
    recipe, features = state.recipe, state.features
    if recipe.maintain == RECONSTRUCT:
        return gm
    forced = recipe.maintain == CACHE
    floats = {f: why for f in features if (why := uncacheable(gm, f)) is not None}
    requests = [f for f in floats if forced and barred(gm, f) is None]
    for name in floats if forced else ():
        if name not in requests:
            feature_key(gm, name)  # raises
    before = converted_block(gm)
    needs = dict(zip(features, needed_tensors(gm, before), strict=True))
    # A feature that uses no weights, such as the timestep itself, is exact and free without a table.
    floats |= {n: "computing it takes no bytes" for n, tensors in needs.items() if not tensors}
    floats |= {n: "it is a table already" for n, ts in needs.items() if any(ROOT in t.split(".") for t in ts)}
    cached = {n: cached_bytes(gm, n, recipe.cache_type) for n in features if n not in floats}
    options = measured_options(
        gm, calibration, reconstructed=list(needs.values()), cached=cached, seed=seed, effects=not forced
    )
    for name in requests:
        options[name][REQUEST] = Option(tensors=request_bytes(gm, name), distance=0.0)
    most = {n: CACHE if n in cached else RECONSTRUCT for n in features}  # every feature that can be is cached
    most |= dict.fromkeys(requests, REQUEST)
    chosen = most if forced else choose(options, bound=recipe.maintain_bound, budget=recipe.maintain_bytes)
    decisions = _decisions(gm, options, chosen, floats, forced=forced)
    names = [n for n in features if chosen[n] == CACHE]
    cache_temporal(gm, tables=feature_tables(gm, names), cache_type=recipe.cache_type)
    open_temporal(gm, features=requests)
    after = converted_block(gm) if state_of(gm).features else None
    found = Maintenance(
        bound=None if forced else recipe.maintain_bound,
        budget=None if forced else recipe.maintain_bytes,
        cache_type=recipe.cache_type,
        features=tuple(decisions),
        bytes={
            RECONSTRUCT: total_bytes(options, dict.fromkeys(features, RECONSTRUCT)),
            CACHE: total_bytes(options, most),
            "chosen": total_bytes(options, chosen),
        },
        seconds_per_call={
            RECONSTRUCT: seconds_per_call(gm, before),
            "chosen": 0.0 if after is None else seconds_per_call(gm, after),
        },
    )
    notes = [
        Note(name=n, reason=f"reconstructed, not cached: {why}", coarser=False)
        for n, why in floats.items()
        if n not in requests
    ]
    if not forced:
        notes += _over(options, chosen, recipe.maintain_bound)
    set_state(gm, dataclasses.replace(state_of(gm).with_notes(*notes), maintenance=found))
    return gm


def _over(options: Mapping[str, Mapping[str, Option]], chosen: Mapping[str, str], bound: float) -> list[Note]:
    """Return a note for each feature whose disturbance stays over the bound."""
    reason = f"disturbance over maintain_bound={bound:g}"
    return [Note(name=n, reason=reason) for n, m in chosen.items() if options[n][m].disturbance > bound]


def _decisions(
    gm: GraphModule,
    options: Mapping[str, Mapping[str, Option]],
    chosen: Mapping[str, str],
    floats: Mapping[str, str],
    *,
    forced: bool,
) -> list[Decision]:
    state = state_of(gm)
    paths = dict(zip(state.features, state.feature_paths, strict=True))
    users: dict[str, set[str]] = {}  # tensor -> the features that may need it
    for feature, given in options.items():
        for option in given.values():
            for tensor in option.tensors:
                users.setdefault(tensor, set()).add(feature)
    found = []
    for name, given in options.items():
        own = {m: sum(b for t, b in o.tensors.items() if len(users[t]) == 1) for m, o in given.items()}
        found.append(
            Decision(
                feature=name,
                path=paths[name],
                key=() if name in floats else feature_key(gm, name),
                bytes=own,
                disturbance={m: o.distance for m, o in given.items()},
                effect={m: o.effect for m, o in given.items() if o.effect is not None},
                chosen=chosen[name],
                why=floats[name]
                if name in floats
                else "Recipe.maintain is cache"
                if forced
                else _why(given, own, chosen[name], state.recipe.maintain_bound),
            )
        )
    return found


def _why(given: Mapping[str, Option], own: Mapping[str, int], chosen: str, bound: float) -> str:
    (other,) = (m for m in given if m != chosen)
    mine, theirs = given[chosen].disturbance, given[other].disturbance
    if mine > bound:
        return f"disturbance {mine:.1e}, over the bound {bound:.1e}; {other}: {theirs:.1e}"
    if theirs > bound:
        return f"{other}: disturbance {theirs:.1e}, over the bound {bound:.1e}"
    if own[chosen] <= own[other]:
        return f"{own[chosen]} unshared bytes, {other}: {own[other]}"
    if mine < theirs:
        return (
            f"disturbance {mine:.1e}, {other}: {theirs:.1e}; the budget allows it, or the other features no longer need the bytes "
            "they share"
        )
    return f"{own[chosen]} unshared bytes, {other}: {own[other]}; the total is smaller because of the bytes that features share"
