"""Quantize a float network or pipeline: the stages as one list, and the call that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tfmq_fx.artefact.forms import closed_graph
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.interface import Interface
from tfmq_fx.artefact.outside import Outside
from tfmq_fx.artefact.plain import plain_config
from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.masked_rows import MaskedRows
from tfmq_fx.base.offloaded import usable_device
from tfmq_fx.base.progress import Clock
from tfmq_fx.calibration.data import CalibrationSet, as_taken
from tfmq_fx.calibration.padding import cut_by_masks
from tfmq_fx.calibration.pipelines import holders, network_of, require_model, usual_steps
from tfmq_fx.calibration.ready import require_ready
from tfmq_fx.calibration.stage import calibrate, input_maxima, require_known, require_rows, require_set
from tfmq_fx.calibration.timesteps import USUAL
from tfmq_fx.capturing.calibrated import capture_rows, described
from tfmq_fx.choices import choose, is_open
from tfmq_fx.evaluation.errors import measure_errors, rows_to_measure
from tfmq_fx.evaluation.summary import summary
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.graph.state import set_state
from tfmq_fx.graph.written import kept, written_buffers
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.model import PrecomputedModel, QuantizedModel
from tfmq_fx.passes.clean.offload_weights import offload_weights, return_weights
from tfmq_fx.passes.low_bits.low_rank import low_rank
from tfmq_fx.passes.low_bits.rotate import rotate
from tfmq_fx.passes.low_bits.smooth import smooth
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.quantize.convert import convert
from tfmq_fx.passes.quantize.float_at_unseen import float_at_unseen
from tfmq_fx.passes.quantize.plan import Note, smoothing_of
from tfmq_fx.passes.quantize.prepare import prepare, tables_of
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, find_temporal
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal
from tfmq_fx.recipe import OFF, Recipe
from tfmq_fx.reconstruction.stage import reconstruct
from tfmq_fx.settings import Settings

Stage = Callable[[GraphModule], Any]  # a pass with its settings bound


def quantize(
    model: Any,
    recipe: str | Recipe = "w4a8",
    *,
    calibration: CalibrationSet | None = None,
    timesteps: Iterable[float] | Tensor | None = None,
    timestep: str = "timestep",
    finite: Mapping[str, Iterable[Any] | Tensor] | None = None,
    component: str | None = None,
    seed: int = 0,
    strict: bool = False,
    state: str | Path | None = None,
    execution_device: str | torch.device | None = None,
) -> QuantizedModel:
    """Quantize a diffusion pipeline's denoiser, or any network that torch.export captures, by `stages`.

    model: a diffusers pipeline, whose denoiser is quantized, or a network. It is left unchanged, and no other thread may call it
        meanwhile. Of a network from `precompute`, the features stay tables (maintain="cache").
    recipe: a recipe, or the name of a preset.
    calibration: the calibration set. None records 64 trajectories of 50 steps with the pipeline's own
        scheduler, and 64 prompts of this library's own if the pipeline needs one.
    timesteps: the schedule (T,); None takes the timesteps of the calibration set.
    timestep: the name of the network's argument for the timestep; the default takes that of the calibration set.
    finite: other inputs with finitely many values, {"class_labels": range(10)}; see `prepare`.
    component: the name of the pipeline's component to quantize, if several take a timestep.
    strict: raise TFMQError, before any calibration, if something would stay in float or be quantized more
        coarsely than the recipe asks for. Later, raise it if maintain="auto" cannot keep a temporal feature
        within its bound. Without `strict`, the report lists all this.
    state: a folder that keeps what reconstruction has finished; see `reconstruct`.
    execution_device: where all stages compute, "cuda", if the network does not fit there. It stays where it lies, and so does what
        is made of it; an operator that reads a weight copies it to the device, and frees the copy. None: where the network lies.

    The same seed gives the same integers. Raises TFMQError for bad input, naming it.
    """
    recipe, device = Recipe.of(recipe), usable_device(execution_device, "execution_device")
    settings = Settings(
        timestep=timestep,
        component=component,
        finite=finite,
        seed=seed,
        strict=strict,
        state=state,
        execution_device=None if device is None else str(device),
    )
    require_model(model, component)
    if isinstance(model, nn.Module):
        require_ready(model)
    # The pipeline runs under the caller's torch settings, everything else without them.
    calibration = _recorded(model, settings) if calibration is None else calibration
    require_set(calibration)
    if timestep == USUAL:  # the data know its name
        settings = dataclasses.replace(settings, timestep=calibration.timestep)
    network = network_of(model, timestep=settings.timestep, component=component)
    require_ready(network)
    places = "" if network is model else _places(model, network)
    with neutral():
        return _quantized(network, recipe, calibration, timesteps, settings, places)


def _quantized(
    network: nn.Module,
    recipe: Recipe,
    calibration: CalibrationSet,
    timesteps: Iterable[float] | Tensor | None,
    settings: Settings,
    places: str,
) -> QuantizedModel:
    schedule = _schedule(recipe, calibration, timesteps, settings)
    clock = Clock()
    where: dict[str, Any] = {}
    if isinstance(network, PrecomputedModel) and network.outside is not None:
        # Its features stay tables, and its block stays where it is.
        recipe = dataclasses.replace(recipe, maintain="cache")
        where = {"place": network.outside.place, "most_bytes": network.outside.most_bytes}
    network, gm, interface, config, calibration = _captured(network, calibration, settings)
    home = next(iter(tensors_of(gm).values())).device
    if settings.execution_device is not None:
        offload_weights(gm, device=torch.device(settings.execution_device))
    temporal = find_temporal(gm, timestep=settings.timestep, finite=settings.finite or ())
    block = extract_temporal(fresh(gm), temporal)
    clock.lap("capture")
    choices = choose(gm, recipe, calibration, temporal=temporal, timesteps=schedule, seed=settings.seed)
    recipe = choices.recipe
    if choices.report:
        clock.lap("choose")
    outputs: dict[int, Tensor | None] = dict.fromkeys(
        rows_to_measure(gm, calibration, seed=settings.seed).tolist()
    )
    passes = stages(
        recipe,
        calibration=calibration,
        temporal=temporal,
        block=block,
        timesteps=schedule,
        maxima=choices.maxima,
        outputs=outputs,
        settings=settings,
    )
    converted = PassManager(passes, done=clock.lap)(fresh(gm)).graph_module
    assert isinstance(converted, GraphModule)
    found = {"calibration": (calibration.note, calibration.kinds, choices.note), "pipeline": (places,)}
    for name, reasons in found.items():
        for reason in filter(None, reasons):
            note = Note(name=name, reason=reason, coarser=False)
            set_state(converted, state_of(converted).with_notes(note))
    outside, closed = _outside(converted, block, temporal, where), converted
    if outside is not None:
        device = next(iter(tensors_of(converted).values())).device
        closed = closed_graph(converted, outside, device, taken=outside.taken)
        block = extract_temporal(
            fresh(gm), dataclasses.replace(temporal, features=state_of(converted).features)
        )
    with kept({**written_buffers(gm), **written_buffers(closed)}):
        errors = measure_errors(gm, closed, calibration, block=block, seed=settings.seed, outputs=outputs)
    if settings.execution_device is not None:
        for graph in (converted, *([] if outside is None else [outside.block])):
            return_weights(graph, device=home)
    clock.lap("measure")
    return QuantizedModel(
        converted,
        outside=outside,
        interface=interface,
        timesteps=state_of(converted).timesteps,
        finite=state_of(converted).finite,
        config=config,
        recipe=recipe.to_json(),
        report={
            **summary(converted, network, seed=settings.seed, clock=clock, errors=errors),
            "choices": choices.report,
            "inputs": interface.sizes(),
        },
    )


def _places(pipe: Any, network: nn.Module) -> str:
    """Return a note on a pipeline that holds its network in several places, as a combined one does; else ""."""
    paths = [path for _, _, path in holders(pipe, network)]
    words = f"the pipeline holds its network as {' and as '.join(paths)}: put the quantized one in each"
    return words if len(paths) > 1 else ""


def _schedule(
    recipe: Recipe,
    calibration: CalibrationSet,
    timesteps: Iterable[float] | Tensor | None,
    settings: Settings,
) -> Tensor:
    """Return the schedule (T,). Raises TFMQError for values and rows that `prepare` and `calibrate` would refuse much later."""
    given = calibration.timesteps if timesteps is None else timesteps
    tables = tables_of(settings.timestep, given, settings.finite)
    require_known(tables, calibration)
    if recipe.keyed == "all" and calibration.tensors[settings.timestep].dim() == 1:
        require_rows(tables[settings.timestep], calibration)
    return tables[settings.timestep]


def _captured(
    network: nn.Module, calibration: CalibrationSet, settings: Settings
) -> tuple[nn.Module, GraphModule, Interface, dict[str, Any], CalibrationSet]:
    """Return the network that is captured, its graph, how it is called, its config, and the set as the graph takes it.

    Of a precomputed network, that is the float network it was made from.
    """
    if isinstance(network, PrecomputedModel):
        restored, lists = network.restored(), network.interface.listed
        if isinstance(lists, MaskedRows) and calibration.row_lists is None:
            calibration = cut_by_masks(calibration, lists)
        rows = calibration.batch(max(calibration.groups(2), key=len))
        example = {n: as_taken(restored, n, rows[n]) for n in placeholders(restored)}
        gm, _ = capture_rows(restored, example, settings.timestep)
        return restored, gm, network.interface, network.parts()["config"], calibration
    network, gm, interface, calibration = described(network, calibration, settings.timestep)
    return network, gm, interface, plain_config(network), calibration


def _outside(
    converted: GraphModule, block: GraphModule, temporal: TemporalBlock, where: Mapping[str, Any]
) -> Outside | None:
    """Return the float block beside a converted graph that takes features as inputs; None for any other."""
    state = state_of(converted)
    if not state.outside:
        return None
    return Outside(
        block,
        features=temporal.features,
        taken=state.outside,
        timestep=state.timestep,
        tables=state.tables,
        **where,
    )


def stages(
    recipe: Recipe,
    *,
    calibration: CalibrationSet,
    temporal: TemporalBlock,
    block: GraphModule | None = None,
    timesteps: Iterable[float] | Tensor | None = None,
    maxima: Mapping[str, Tensor] | None = None,
    outputs: dict[int, Tensor | None] | None = None,
    settings: Settings | None = None,
) -> list[Stage]:
    """Return the passes from a captured float graph to a converted one, in order, for `PassManager` to run.

    The list is the caller's own: passes can be inserted, replaced and left out.

    temporal: the result of `find_temporal` on the float graph.
    block: the temporal block alone, as `extract_temporal` returns it. Only a recipe with unseen="float" needs
        it.
    timesteps: the schedule (T,). None takes the timesteps of the calibration set.
    maxima: of the layers' inputs, if `choose` measured them.
    outputs: see `calibrate`.
    settings: the finite inputs, the seed, `strict` and the folder of reconstruction's state. None takes the
        defaults.

    Raises TFMQError for a recipe that leaves something to `choose`, and for one with unseen="float" without a
    block.
    """
    if is_open(recipe):
        raise TFMQError(
            'stages: the recipe leaves settings open ("auto", float_flops, float_bytes); give the one that '
            "choices.choose(gm, recipe, calibration, temporal=temporal) returns."
        )
    settings = settings or Settings()
    seed, finite = settings.seed, settings.finite
    schedule = calibration.timesteps if timesteps is None else timesteps
    strictly: list[Stage] = [require_whole] if settings.strict else []
    unseen: list[Stage] = []
    if recipe.unseen == "float":
        if block is None:
            raise TFMQError(
                "stages: Recipe.unseen is 'float', which needs block=extract_temporal(fresh(gm), temporal)."
            )
        unseen = [partial(float_at_unseen, block=block)]
    return [
        *low_bits(recipe, calibration=calibration, temporal=temporal, maxima=maxima, seed=seed),
        partial(prepare, recipe=recipe, timesteps=schedule, temporal=temporal, finite=finite),
        *strictly,
        partial(calibrate, calibration=calibration, outputs=outputs),
        partial(reconstruct, calibration=calibration, seed=seed, state=settings.state),
        partial(maintain, calibration=calibration, seed=seed),
        *unseen,
        *strictly,
        convert,
    ]


def low_bits(
    recipe: Recipe,
    *,
    calibration: CalibrationSet,
    temporal: TemporalBlock,
    maxima: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> list[Stage]:
    """Return the recipe's passes that make the float graph easier to quantize. They keep its function.

    maxima: of the layers' inputs, for `smooth`; None measures them.
    """
    found: list[Stage] = []
    limit = recipe.reconstruction.max_memory
    if any(
        s not in (None, OFF) for s in (recipe.smooth, *(r.smooth for r in (*recipe.rules, *recipe.chosen)))
    ):
        measured = maxima or partial(input_maxima, calibration=calibration, seed=seed)
        alpha = partial(smoothing_of, recipe=recipe)
        found.append(partial(smooth, maxima=measured, alpha=alpha, temporal=temporal, max_memory=limit))
    if recipe.rotate is not None:
        found.append(partial(rotate, block=recipe.rotate, temporal=temporal, max_memory=limit))
    if recipe.low_rank is not None:
        # The error of coarse activations is proportional to what is left of W. So then the branch must take
        # the largest part of W itself.
        weights_alone = recipe.weight_bits < 8 <= recipe.activation_bits
        bits = recipe.weight_bits if weights_alone else None
        found.append(partial(low_rank, rank=recipe.low_rank, bits=bits, temporal=temporal, max_memory=limit))
    return found


def require_whole(gm: GraphModule) -> None:
    """Raise TFMQError if anything is in float, or keyed more coarsely, that the recipe does not ask to be."""
    plan = state_of(gm).plan
    found = [f"{f.name}: {f.reason}" for f in plan.floats if not f.chosen]
    found += [f"{n.name}: {n.reason}" for n in plan.notes if n.coarser]
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise TFMQError(f"strict: {len(found)} deviation(s) from the recipe: {'; '.join(found[:3])}{more}.")


def _recorded(model: Any, settings: Settings) -> CalibrationSet:
    """Record a pipeline's own trajectories. Raises TFMQError for a network alone, which has none."""
    if isinstance(model, nn.Module):
        raise TFMQError("calibration: a network alone has no trajectories to record; give a CalibrationSet.")
    return CalibrationSet.record(
        model,
        num_samples=64,
        num_inference_steps=usual_steps(model),
        seed=settings.seed,
        timestep=settings.timestep,
        component=settings.component,
        execution_device=settings.execution_device,
    )
