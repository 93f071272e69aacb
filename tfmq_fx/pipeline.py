"""One call from a float network or pipeline to a quantized model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tfmq_fx.artefact.drop_in import Interface
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.parallel import workers
from tfmq_fx.base.progress import Clock
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.pipelines import denoiser
from tfmq_fx.calibration.stage import calibrate, input_maxima
from tfmq_fx.calibration.temporal_rows import temporal_rows
from tfmq_fx.capturing import captured
from tfmq_fx.evaluation.errors import ERROR_ROWS, errors_by_timestep, temporal_distance, temporal_drift
from tfmq_fx.evaluation.summary import summary
from tfmq_fx.graph.inputs import conditioning_vectors
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.model import QuantizedModel
from tfmq_fx.passes.low_bits.low_rank import low_rank
from tfmq_fx.passes.low_bits.rotate import rotate
from tfmq_fx.passes.low_bits.smooth import smooth
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.quantize.convert import convert
from tfmq_fx.passes.quantize.float_at_unseen import float_at_unseen
from tfmq_fx.passes.quantize.plan import Plan
from tfmq_fx.passes.quantize.prepare import prepare
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, find_temporal
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal
from tfmq_fx.recipe import Recipe
from tfmq_fx.reconstruction.stage import reconstruct


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
) -> QuantizedModel:
    """Capture, find the temporal block, prepare, calibrate, reconstruct, maintain and convert.

    model: a diffusers pipeline, whose denoiser is quantized, or any network that torch.export captures. It is
        left as it was.
    calibration: for a pipeline, None records 64 trajectories of 50 steps with the pipeline's own scheduler.
    timesteps: the schedule (T,); None takes the timesteps of the calibration set.
    component: which of a pipeline's components, where several take a timestep.
    finite: other inputs with finitely many values, {"class_labels": range(10)}; see `prepare`.

    strict: refuse, before any calibration, a network of which something would stay in float or be quantized more
        coarsely than the recipe asks for; and, later, a temporal feature that maintain="auto" cannot keep within its
        bound. The report lists the same otherwise.

    state: a folder that keeps what reconstruction has finished; see `reconstruct`.

    The same seed gives the same integers. Raises TFMQError for bad input, naming it.
    """
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    network = (
        model if isinstance(model, nn.Module) else denoiser(model, timestep=timestep, component=component)
    )
    _refuse_adapters(network)
    if calibration is None:
        if network is model:
            raise TFMQError(
                "calibration: a network alone has no trajectories to record; give a CalibrationSet."
            )
        calibration = CalibrationSet.record(
            model, num_samples=64, num_inference_steps=50, seed=seed, timestep=timestep, component=component
        )
    timesteps = calibration.timesteps if timesteps is None else timesteps
    clock = Clock()

    gm, example = captured(network, calibration, timestep)
    vectors = {*conditioning_vectors(gm, timestep), *(finite or {})}
    temporal = find_temporal(gm, timestep=timestep, conditioning=vectors)
    clock.lap("capture")
    easier = low_bits(gm, recipe, temporal=temporal, calibration=calibration, seed=seed)
    if easier is not gm:
        clock.lap("low_bits")
    prepared = prepare(easier, recipe, timesteps=timesteps, temporal=temporal, finite=finite)
    if strict:
        _require_whole(prepared.meta["plan"])
    clock.lap("prepare")
    calibrate(prepared, calibration)
    clock.lap("calibrate")
    reconstruct(prepared, calibration, seed=seed, state=state)
    rows = temporal_rows(prepared, calibration.tensors)
    paths = {layer.node: layer.path.removesuffix(".weight") for layer in prepared.meta["plan"].layers}
    clock.lap("reconstruct")
    if recipe.maintain != "reconstruct":
        maintain(prepared, calibration, seed=seed)
        clock.lap("maintain")
    if recipe.unseen == "float":
        float_at_unseen(prepared, block=extract_temporal(gm, temporal))
    if strict:
        _require_whole(prepared.meta["plan"])
    converted = convert(prepared)
    clock.lap("convert")
    interface = Interface.of(network, gm, example, _output_type(network, example))
    quantized = QuantizedModel(
        converted,
        interface=interface,
        timesteps=prepared.meta["timesteps"],
        finite=prepared.meta["finite"],
        config=_config(network),
        recipe=recipe.to_json(),
        report={},
    )
    distance = temporal_distance(gm, temporal, quantized, rows)
    errors = errors_by_timestep(gm, quantized, calibration.spread(ERROR_ROWS, seed=seed), rows, distance)
    clock.lap("measure")
    quantized._report = summary(converted, network, recipe, seed, clock, errors)
    quantized._report["temporal_drift"] = temporal_drift(
        gm, [paths.get(name, name) for name in temporal.features], quantized, rows, distance
    )
    return quantized


def _refuse_adapters(network: nn.Module) -> None:
    """Raise TFMQError when peft has put layers of its own into the network: they would be rounded one by one."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None and any(isinstance(m, tuners.BaseTunerLayer) for m in network.modules()):
        raise TFMQError(
            "quantize: the network has adapters (LoRA) beside its weights; pipe.fuse_lora(), then pipe.unload_lora_weights()."
        )


def low_bits(
    gm: GraphModule, recipe: Recipe, *, temporal: TemporalBlock, calibration: CalibrationSet, seed: int = 0
) -> GraphModule:
    """The float graph as `recipe` wants it before quantization, the same function: a new graph module, or `gm` itself."""
    passes: list[Any] = []
    if recipe.smooth is not None:
        maxima = input_maxima(gm, calibration, seed=seed)
        passes.append(partial(smooth, maxima=maxima, alpha=recipe.smooth, temporal=temporal))
    if recipe.rotate is not None:
        passes.append(partial(rotate, block=recipe.rotate, temporal=temporal))
    if recipe.low_rank is not None:
        # Coarse activations err in proportion to what is left of W: then the branch must take the largest part of W itself.
        weights_alone = recipe.weight_bits < 8 <= recipe.activation_bits
        bits = recipe.weight_bits if weights_alone else None
        passes.append(partial(low_rank, rank=recipe.low_rank, bits=bits, temporal=temporal))
    if not passes:
        return gm
    with workers(1):  # a singular value's last bits depend on the number of threads, the integers must not
        easier = PassManager(passes)(fresh(gm)).graph_module
    assert isinstance(easier, GraphModule)
    return easier


def _require_whole(plan: Plan) -> None:
    """Raise TFMQError when something is in float, or keyed more coarsely, that the recipe did not choose so."""
    found = [f"{f.name}: {f.reason}" for f in plan.floats if not f.chosen]
    found += [f"{n.name}: {n.reason}" for n in plan.notes if n.coarser]
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise TFMQError(f"strict: {len(found)} deviation(s) from the recipe: {'; '.join(found[:3])}{more}.")


def _config(network: nn.Module) -> dict[str, Any]:
    """The network's own configuration, where it has one as diffusers networks do."""
    config: Any = getattr(network, "config", {})
    return dict(config)


@torch.no_grad()
def _output_type(network: nn.Module, example: dict[str, Any]) -> str | None:
    """The class the network returns when it is not told return_dict=False."""
    if "return_dict" not in example:
        return None
    cls = type(network(**{k: v for k, v in example.items() if k != "return_dict"}))
    return f"{cls.__module__}.{cls.__qualname__}" if cls.__module__.startswith("diffusers.") else None
