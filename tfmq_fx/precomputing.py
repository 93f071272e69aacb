"""Take the temporal block out of a float network: its features become tables. Nothing is quantized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.interface import Interface
from tfmq_fx.artefact.outside import REQUEST_BYTES, Outside, require_place
from tfmq_fx.artefact.plain import plain_config
from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.arithmetic import FLOAT_BITS
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.progress import Clock
from tfmq_fx.base.signatures import parameters_of
from tfmq_fx.calibration.calls import repeated
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.pipelines import denoiser, require_model, usual_steps
from tfmq_fx.calibration.ready import require_ready
from tfmq_fx.calibration.timesteps import timestep_of
from tfmq_fx.capturing.agreement import rows_of
from tfmq_fx.capturing.calibrated import capture_rows, captured_without_padding, described
from tfmq_fx.capturing.interfaces import interface_of
from tfmq_fx.capturing.network import batched
from tfmq_fx.capturing.wrappers import unwrapped
from tfmq_fx.evaluation.summary import plain_maintenance, versions
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.graph.state import set_state
from tfmq_fx.maintenance.paying import COMPUTED, REQUEST, TABLE, mixed_layers, paying
from tfmq_fx.maintenance.tables import feature_tables
from tfmq_fx.model import PrecomputedModel
from tfmq_fx.passes.quantize.cache_temporal import EXACT, cache_temporal
from tfmq_fx.passes.quantize.open_temporal import open_temporal
from tfmq_fx.passes.quantize.prepare import prepare_float
from tfmq_fx.passes.quantize.results import Maintenance
from tfmq_fx.passes.quantize.state import state_of, temporal_of
from tfmq_fx.passes.temporal.find_temporal import find_temporal
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal, partition_temporal
from tfmq_fx.recipe import Recipe
from tfmq_fx.settings import Settings

# The arguments of a call of a network, or rows of a pipeline's calls and how many each has.
Called = dict[str, Any] | tuple[CalibrationSet, int]

FLOAT = Recipe(weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS, max_table_entries=2**31)


def precompute(
    model: Any,
    *,
    num_inference_steps: int | None = None,
    example: Mapping[str, Any] | None = None,
    timesteps: Iterable[float] | Tensor | None = None,
    timestep: str = "timestep",
    finite: Mapping[str, Iterable[Any] | Tensor] | None = None,
    component: str | None = None,
    unseen: str = "float",
    block: str = "cpu",
    request_bytes: int = REQUEST_BYTES,
    **pipe_kwargs: Any,
) -> PrecomputedModel:
    """Replace what a diffusion network computes from the timestep by tables, and let the layers that do it leave.

    The result is used in place of the network: same calls, outputs, `.config`, dtype and device. Nothing is quantized.

    A feature that depends on the timestep alone, or on it and `finite` inputs, has a table in the network. One that depends on other
    conditioning as well (pooled text, guidance, sizes, labels) is evaluated once for each new conditioning, at all timesteps at once.
    A feature whose table would not take fewer bytes than its layers stays computed; the report lists every feature.

    model: a diffusers pipeline, whose denoiser is taken, or a network. It is left unchanged.
    num_inference_steps: of the pipeline's own schedule, which is read from a run in which the denoiser computes once. None for 50, or
        the number that a pipeline has which takes none.
    example: the arguments of one call, by name, for a network alone.
    timesteps: the schedule (T,). None takes that of the pipeline's run; a network alone needs it.
    timestep: the name of the network's argument for the timestep.
    finite: other inputs with finitely many values, {"class_labels": range(10)}.
    component: the name of the pipeline's component, if several take a timestep.
    unseen: what a timestep or finite value outside the tables does: "float" evaluates the layers, "nearest" takes its neighbour's
        features, "error" raises TFMQError.
    block: where the layers that left are kept: "cpu", "disk" (a memory-mapped file) or "device", that of the network. With unseen
        other than "float" and no feature of a request, they are not kept at all.
    request_bytes: the most bytes of the tables of requests; the oldest are forgotten.
    pipe_kwargs: passed to the pipeline: a prompt, a size, a guidance scale.

    Numerics, on the CPU: outputs equal the network's, bit for bit. But the order in which a matrix product is summed may depend on the
    number of rows; in float32 it does. So features of a request, whose timesteps are computed in one batch, are within a few roundings,
    about 1e-6 of their largest value in float32. A table is made for as many samples as the example's (a pipeline's: of its run); at another number of them, a
    feature is evaluated once for each timestep. With `finite` inputs, or without the layers, it is then within roundings, too.

    Raises TFMQError for bad input, naming it; for a network without a temporal block, and for a schedule of which no table is smaller
    than the layers.
    """
    recipe = dataclasses.replace(FLOAT, unseen=unseen)
    require_model(model, component)
    if not isinstance(model, nn.Module):
        steps = usual_steps(model) if num_inference_steps is None else num_inference_steps
        timestep = timestep_of(model, timestep, component=component, steps=steps, pipe_kwargs=pipe_kwargs)
    settings = Settings(timestep=timestep, component=component, finite=finite)
    require_place(block)
    if isinstance(model, nn.Module):
        found = _given(model, example, timesteps, pipe_kwargs)
    else:
        found = _run(model, settings, steps, example, timesteps, pipe_kwargs)
    with neutral():
        return _precomputed(*found, recipe, settings, place=block, request_bytes=request_bytes)


def _given(
    network: nn.Module,
    example: Mapping[str, Any] | None,
    timesteps: Iterable[float] | Tensor | None,
    pipe_kwargs: Mapping[str, Any],
) -> tuple[nn.Module, Called, Iterable[float] | Tensor]:
    """Return a network, its example and its schedule. Raises TFMQError for one that is missing."""
    if pipe_kwargs:
        raise TFMQError(f"{next(iter(pipe_kwargs))}: is an argument for a pipeline, but a network is given.")
    if example is None or timesteps is None:
        missing = "example" if example is None else "timesteps"
        raise TFMQError(
            f"{missing}: a network alone has no sampling run; give example={{argument: tensor, ..}} and timesteps=."
        )
    _require_float(network)
    return network, dict(example), timesteps


def _require_float(network: nn.Module) -> None:
    """Raise TFMQError unless this is a plain float network that has its temporal block."""
    require_ready(network)
    if isinstance(network, PrecomputedModel):
        raise TFMQError(
            "precompute: the network is precomputed already; for another schedule, give the float network."
        )


def _run(
    pipe: Any,
    settings: Settings,
    num_inference_steps: int | None,
    example: Mapping[str, Any] | None,
    timesteps: Iterable[float] | Tensor | None,
    pipe_kwargs: dict[str, Any],
) -> tuple[nn.Module, Called, Iterable[float] | Tensor]:
    """Return a pipeline's network, rows of a run that computes little and how many its calls have, and the schedule."""
    if example is not None:
        raise TFMQError("example: a pipeline makes its own; give the arguments of its call instead.")
    which: dict[str, Any] = {"timestep": settings.timestep, "component": settings.component}
    network = denoiser(pipe, **which)
    _require_float(network)
    with repeated(network) as calls:
        data = CalibrationSet.record(
            pipe,
            num_samples=1,
            num_inference_steps=num_inference_steps,
            batch_size=1,
            seed=settings.seed,
            **which,
            **pipe_kwargs,
        )
    listed = data.row_lists
    rows = (
        rows_of(calls[-1], settings.timestep) if listed is None else sum(map(len, listed.groups(calls[-1])))
    )
    return network, (data, max(rows, 1)), data.timesteps if timesteps is None else timesteps


@torch.no_grad()
def _precomputed(
    network: nn.Module,
    called: Called,
    timesteps: Iterable[float] | Tensor,
    recipe: Recipe,
    settings: Settings,
    *,
    place: str,
    request_bytes: int,
) -> PrecomputedModel:
    clock = Clock()
    if isinstance(called, dict):
        network, gm, interface, batch = _captured(network, called, settings.timestep)
    else:
        data, batch = called
        network, gm, interface, _ = described(network, data, settings.timestep)
    clock.lap("capture")
    gm, plain = prepared(gm, recipe, timesteps, settings), gm
    found = paying(gm)
    _require_one(gm, found)
    notes = mixed_layers(gm)
    gone = {d.feature: d.chosen for d in found.features if d.chosen != COMPUTED}
    part = find_temporal(
        plain, timestep=settings.timestep, finite=settings.finite or (), features=tuple(gone)
    )
    layers = extract_temporal(fresh(plain), part)
    cache_temporal(
        gm, tables=feature_tables(gm, [n for n in gone if gone[n] == TABLE], batch=batch), cache_type=EXACT
    )
    open_temporal(gm, features=[n for n in gone if gone[n] == REQUEST])
    state = dataclasses.replace(state_of(gm).with_notes(*notes), stage="converted", maintenance=found)
    set_state(gm, state)
    partition_temporal(gm, temporal=temporal_of(gm))
    clock.lap("tables")
    outside = None
    if state.outside or recipe.unseen == "float":
        outside = Outside(
            layers,
            features=part.features,
            taken=state.outside,
            timestep=state.timestep,
            tables=state.tables,
            place=place,
            most_bytes=request_bytes,
            batch=batch,
        )
    gm = GraphModule(gm, gm.graph)  # only with what the graph reads
    set_state(gm, state)
    return PrecomputedModel(
        gm,
        interface=interface,
        timesteps=state.timesteps,
        finite=state.finite,
        config=plain_config(network),
        recipe=recipe.to_json(),
        report=_report(gm, network, clock, outside),
        outside=outside,
    )


def _captured(
    network: nn.Module, example: dict[str, Any], timestep: str
) -> tuple[nn.Module, GraphModule, Interface, int]:
    """Return the network without wrappers, its graph, how it is called, and the number of rows of this call."""
    network, given, _ = batched(unwrapped(network, example), example, timestep)
    rows = max(rows_of(given, timestep), 1)
    more = {"return_dict": False} if "return_dict" in parameters_of(network) else {}
    try:
        gm, taken = capture_rows(network, {**given, **more}, timestep)
    except TFMQError:  # the lengths of its rows may be numbers to it
        data = _set_of({**given, **more}, timestep)
        found = None if data is None else captured_without_padding(network, data, timestep)
        if found is None:
            raise
        gm, taken, cut = found
        return network, gm, interface_of(cut.row_wise(network), gm, taken), rows
    return network, gm, interface_of(network, gm, taken), rows


def _set_of(example: Mapping[str, Any], timestep: str) -> CalibrationSet | None:
    """Return the rows of an example as a set; None if they make none."""
    rows, found = rows_of(example, timestep), leaves(example)
    t = found[timestep][1]
    if not rows or not isinstance(t, Tensor):
        return None
    values = {n: x for n, (_, x) in found.items()} | {timestep: t.expand(rows) if t.dim() == 0 else t}
    tensors = {n: x for n, x in values.items() if isinstance(x, Tensor) and x.shape[:1] == (rows,)}
    try:
        return CalibrationSet(
            tensors,
            {n: x for n, x in values.items() if n not in tensors},
            timestep,
            {n: path for n, (path, _) in found.items()},
        )
    except TFMQError:
        return None


def prepared(
    gm: GraphModule, recipe: Recipe, timesteps: Iterable[float] | Tensor, settings: Settings
) -> GraphModule:
    """Return a captured graph with its step index and state, ready for `paying`."""
    temporal = find_temporal(gm, timestep=settings.timestep, finite=settings.finite or ())
    return prepare_float(gm, recipe, timesteps=timesteps, temporal=temporal, finite=settings.finite)


def _require_one(gm: GraphModule, found: Maintenance) -> None:
    """Raise TFMQError if no feature has a table, with the longest schedule that pays, or why there is none."""
    if any(d.chosen != COMPUTED for d in found.features):
        return
    steps = len(state_of(gm).timesteps)
    pays = [d for d in found.features if len(d.bytes) > 1]
    if not pays:
        first = found.features[0]
        raise TFMQError(f"precompute: no temporal feature can have a table; {first.path}: {first.why}.")
    tables, layers = found.bytes[TABLE], found.bytes[COMPUTED]
    longest = math.floor(steps * layers / tables)
    raise TFMQError(
        f"timesteps: tables for {steps} take {tables} bytes, but the layers that compute them {layers}; at most about {longest} "
        "timesteps pay."
    )


def _report(gm: GraphModule, network: nn.Module, clock: Clock, outside: Outside | None) -> dict[str, Any]:
    """Return the report as plain JSON values."""
    state = state_of(gm)
    assert state.maintenance is not None
    left = sum(x.nbytes for x in tensors_of(gm).values())
    whole = sum(p.nbytes for p in network.parameters())
    tables = sum(x.nbytes for n, x in tensors_of(gm).items() if n in {c.table for c in state.cached})
    return {
        "recipe": state.recipe.to_json(),
        "layers": [],
        "notes": [dataclasses.asdict(n) for n in state.plan.notes],
        "sizes": {
            "float_bytes": whole,
            "quantized_bytes": left,
            "ratio": left / whole,
            "table_bytes": tables,
            "block_bytes": 0 if outside is None else outside.size,
        },
        "temporal_block": {
            "features": len(state.maintenance.features),
            "timesteps": len(state.timesteps),
            "finite": {name: len(values) for name, values in state.finite.items()},
            "keys": {d.feature: list(d.key) for d in state.maintenance.features},
        },
        "maintenance": plain_maintenance(state.maintenance),
        "errors_by_timestep": [],
        "seconds": clock.seconds,
        "versions": versions(),
    }
