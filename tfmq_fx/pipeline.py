"""One call from a float network or pipeline to a quantized model."""

from __future__ import annotations

import dataclasses
import inspect
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from tfmq_fx.calibration import CalibrationSet, calibrate, input_maxima, inputs_of
from tfmq_fx.capturing import capture
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import fresh, placeholders
from tfmq_fx.graph_json import packed_tensors, quantized_weights, tensors_of
from tfmq_fx.maintenance import maintain
from tfmq_fx.metrics import cosine_distance, relative_mse_by_timestep
from tfmq_fx.model import Interface, QuantizedModel
from tfmq_fx.parallel import workers
from tfmq_fx.passes.annotate import Plan
from tfmq_fx.passes.convert import convert
from tfmq_fx.passes.find_temporal import TemporalBlock, conditioning_vectors, find_temporal
from tfmq_fx.passes.float_at_unseen import float_at_unseen
from tfmq_fx.passes.low_rank import low_rank
from tfmq_fx.passes.partition_temporal import extract_temporal
from tfmq_fx.passes.pass_manager import LOW_BITS, PassManager
from tfmq_fx.passes.prepare import prepare
from tfmq_fx.passes.rotate import rotate
from tfmq_fx.passes.smooth import smooth
from tfmq_fx.recipe import Recipe
from tfmq_fx.reconstruction import reconstruct
from tfmq_fx.recording import denoiser
from tfmq_fx.temporal import chunks_of, is_scalar, run_temporal, temporal_rows

ERROR_ROWS = 512  # calibration rows on which the report's errors by timestep are measured


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
    clock = _Clock()

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
    distance = _temporal_distance(gm, temporal, quantized, rows)
    errors = _errors_by_timestep(gm, quantized, calibration.spread(ERROR_ROWS, seed=seed), rows, distance)
    clock.lap("measure")
    quantized._report = _report(converted, network, recipe, seed, clock, errors)
    quantized._report["temporal_drift"] = _drift(
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


def captured(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any]]:
    """`capture` on the first rows of the calibration set; the graph and the arguments it was captured with."""
    example = calibration.arguments(slice(0, 2))
    if "return_dict" in inspect.signature(network.forward).parameters:
        example["return_dict"] = False
    return capture_rows(network, example, timestep)


def capture_rows(
    network: nn.Module, example: dict[str, Any], timestep: str
) -> tuple[GraphModule, dict[str, Any]]:
    """`capture` on rows with a timestep each, (N,); for a network that takes one timestep a call, on ()."""
    try:
        return capture(network, example, timestep=timestep), example
    except TFMQError:
        if not isinstance(example.get(timestep), Tensor) or example[timestep].dim() != 1:
            raise
        one = {**example, timestep: example[timestep][0]}
        try:
            return capture(network, one, timestep=timestep), one
        except TFMQError:
            pass  # the first error is the one to show
        raise


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


class _Clock:
    """Seconds by stage: of the wall, and of all threads together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._last = time.monotonic(), time.process_time()

    def lap(self, stage: str) -> None:
        now = time.monotonic(), time.process_time()
        self.seconds[stage], self.cpu_seconds[stage] = (
            round(b - a, 3) for a, b in zip(self._last, now, strict=True)
        )
        self._last = now


@torch.no_grad()
def _output_type(network: nn.Module, example: dict[str, Any]) -> str | None:
    """The class the network returns when it is not told return_dict=False."""
    if "return_dict" not in example:
        return None
    cls = type(network(**{k: v for k, v in example.items() if k != "return_dict"}))
    return f"{cls.__module__}.{cls.__qualname__}" if cls.__module__.startswith("diffusers.") else None


@torch.no_grad()
def _temporal_distance(
    gm: GraphModule, temporal: TemporalBlock, quantized: QuantizedModel, rows: Mapping[str, Tensor]
) -> Tensor | None:
    """(features, R) cosine distances to the float features; None where the block needs more than its keys."""
    if not placeholders(quantized.temporal_block).keys() <= rows.keys():
        return None
    scalar = is_scalar(gm)
    float_block = extract_temporal(gm, temporal)
    distances = [
        cosine_distance(
            run_temporal(quantized.temporal_block, part, scalar=scalar),
            run_temporal(float_block, part, scalar=scalar),
        )
        for part in chunks_of(rows)
    ]
    return torch.cat(distances, dim=1)


def _drift(
    gm: GraphModule,
    features: list[str],
    quantized: QuantizedModel,
    rows: Mapping[str, Tensor],
    distance: Tensor | None,
) -> dict[str, Any] | None:
    """Every feature's mean cosine distance at every timestep."""
    if distance is None:
        return None
    t = rows[gm.meta["timestep"]]
    by_timestep = torch.stack([distance[:, t == value].mean(1) for value in quantized.timesteps], dim=1)
    return {
        "features": features,
        "timesteps": quantized.timesteps.tolist(),
        "cosine_distance": [[float(f"{x:.3e}") for x in row] for row in by_timestep.tolist()],
    }


@torch.no_grad()
def _errors_by_timestep(
    gm: GraphModule,
    quantized: QuantizedModel,
    data: CalibrationSet,
    rows: Mapping[str, Tensor],
    distance: Tensor | None,
) -> list[dict[str, float]]:
    """By timestep: relative MSE of the output; cosine distance of the temporal features, their mean and worst."""
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in data.batches(128, one_timestep=is_scalar(gm)):
        inputs = inputs_of(gm, batch)
        outputs.append(
            (first_tensor(quantized.network(*inputs)), first_tensor(gm(*inputs)), batch[data.timestep])
        )
    output = relative_mse_by_timestep(*(torch.cat(column) for column in zip(*outputs, strict=True)))
    errors = []
    for t in quantized.timesteps:
        row = {"timestep": t.item()}
        if t.item() in output:
            row["output_relative_mse"] = output[t.item()]
        if distance is not None:
            at = distance[:, rows[data.timestep] == t]
            row["temporal_cosine_distance"] = at.mean().item()
            row["temporal_cosine_distance_worst"] = at.max().item()
        errors.append(row)
    return errors


def first_tensor(output: Any) -> Tensor:
    leaf: Tensor = pytree.tree_leaves(output)[0]
    return leaf


def _report(
    gm: GraphModule,
    network: nn.Module,
    recipe: Recipe,
    seed: int,
    clock: _Clock,
    errors: list[dict[str, float]],
) -> dict[str, Any]:
    plan = gm.meta["plan"]
    integers = quantized_weights(gm)
    tensors = tensors_of(gm)
    layers = [dataclasses.asdict(layer) for layer in plan.layers]
    floats = [dataclasses.asdict(f) for f in plan.floats]
    quantized = {layer.path for layer in plan.layers if f"{layer.path}_q" in integers}
    left = {n: p for n, p in network.named_parameters() if n not in gm.meta.get("removed", ())}
    for name, p in left.items():
        if name not in quantized and name not in {f["name"] for f in floats}:
            floats.append(
                {
                    "name": name,
                    "reason": "bias or affine parameter"
                    if p.dim() <= 1
                    else "no convolution or linear weight",
                }
            )
    packed = packed_tensors(gm)
    packed_bytes = sum(
        tensors[n].numel() * (high - low).bit_length() / 8 for n, (low, high) in packed.items()
    )
    other_bytes = sum(x.numel() * x.element_size() for n, x in tensors.items() if n not in packed)
    changes = [change for name in LOW_BITS for change in gm.meta.get(name, ())]
    added = {t for change in changes for t in change.tensors}
    float_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
    return {
        "recipe": recipe.to_json(),
        "seed": seed,
        "layers": layers,
        "float": floats,
        "notes": [dataclasses.asdict(n) for n in plan.notes],
        "sizes": {
            "float_bytes": float_bytes,
            "quantized_bytes": round(packed_bytes + other_bytes),
            "low_bits_bytes": sum(tensors[n].numel() * tensors[n].element_size() for n in added),
            "ratio": (packed_bytes + other_bytes) / float_bytes,
            "quantized_weights": sum(tensors[n].numel() for n in integers),
            "float_parameters": sum(p.numel() for n, p in left.items() if n not in quantized),
        },
        "low_bits": {
            name: [dataclasses.asdict(change) for change in gm.meta[name]]
            for name in LOW_BITS
            if name in gm.meta
        },
        "temporal_block": {
            "features": len(gm.meta["features"]),
            "timesteps": len(gm.meta["timesteps"]),
            "finite": {name: len(values) for name, values in gm.meta["finite"].items()},
            "keys": {f: list(k) for f, k in zip(gm.meta["features"], gm.meta["feature_keys"], strict=True)},
        },
        "maintenance": {"maintain": recipe.maintain, **gm.meta.get("maintenance", {})},
        "reconstruction": [dataclasses.asdict(r) for r in gm.meta.get("reconstruction", ())],
        "errors_by_timestep": errors,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
