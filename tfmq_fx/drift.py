"""Where and when a quantized network leaves the float one: from stored errors, and along trajectories."""

from __future__ import annotations

import logging
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.arithmetic import NO_INT8
from tfmq_fx.calibration import CalibrationSet
from tfmq_fx.errors import TFMQError
from tfmq_fx.metrics import relative_mse_by_timestep
from tfmq_fx.model import DropIn, QuantizedModel
from tfmq_fx.pipeline import quantize
from tfmq_fx.recipe import Recipe
from tfmq_fx.recording import denoiser, run_pipeline
from tfmq_fx.sampling import swapped

log = logging.getLogger(__name__)
ROWS = 64  # rows of one call when errors are measured


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What one network made of a noise."""

    timesteps: list[float]  # of each call of the network
    inputs: list[Tensor]  # what it was given there, (N, ...) each: x_t
    images: Tensor  # (N, C, H, W) in [-1, 1]


@torch.no_grad()
def trajectory(
    pipe: Any,
    model: DropIn,
    network: nn.Module,
    *,
    num_samples: int,
    num_inference_steps: int,
    seed: int,
    **pipe_kwargs: Any,
) -> Trajectory:
    """Sample with `network`, the float one or `model`, and keep every x_t that it is given.

    A guided batch holds the rows of one picture more than once: the last `num_samples` are kept, the conditional ones.
    """
    names = list(model.interface.arguments)
    kept: list[tuple[float, Tensor]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        t = torch.as_tensor(given[model.interface.timestep]).flatten()[0].item()
        kept.append((t, given[model.first_input][-num_samples:].clone()))

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with swapped(pipe, network):
            drawn = run_pipeline(
                pipe,
                num_samples,
                num_inference_steps=num_inference_steps,
                generator=torch.Generator().manual_seed(seed),
                **pipe_kwargs,
            )
    finally:
        handle.remove()
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
    return Trajectory(timesteps=[t for t, _ in kept], inputs=[x for _, x in kept], images=images)


def nearest_of(pipe: Any, model: QuantizedModel, data: CalibrationSet) -> QuantizedModel:
    """The same recipe by round-to-nearest alone, calibrated on the given data: what reconstruction is measured against."""
    recipe = Recipe.from_json(model.recipe)
    plain = replace(recipe.reconstruction, method="nearest", temporal_method="nearest")
    return quantize(
        denoiser(pipe, timestep=model.interface.timestep),
        replace(recipe, reconstruction=plain),
        calibration=data,
        timestep=model.interface.timestep,
        finite=model.finite,
    )


@torch.no_grad()
def output_errors(
    reference: nn.Module, networks: Mapping[str, Callable[..., Any]], data: CalibrationSet
) -> dict[str, dict[float, float]]:
    """Relative MSE of each network's output to the reference's, by timestep, on the same rows."""
    starts = range(0, len(data), ROWS)
    expected = torch.cat([_output(reference, data, i) for i in starts])
    t = data.tensors[data.timestep]
    return {
        name: relative_mse_by_timestep(torch.cat([_output(f, data, i) for i in starts]), expected, t)
        for name, f in networks.items()
    }


def _output(network: Callable[..., Any], data: CalibrationSet, start: int) -> Tensor:
    found = network(**data.arguments(slice(start, start + ROWS)) | {"return_dict": False})
    first: Tensor = found[0]
    return first.float()


def in_bfloat16(network: nn.Module) -> Callable[..., Any]:
    """The float network under autocast: a floor that people accept without asking."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return network(*args, **kwargs)

    return call


@torch.no_grad()
def milliseconds(
    networks: Mapping[str, Callable[..., Any]], data: CalibrationSet, *, batch: int, rounds: int = 7
) -> dict[str, float]:
    """The median of a call's wall time at one batch size, the networks taking turns; a first call warms up."""
    arguments = data.arguments(slice(0, batch)) | {"return_dict": False}
    found: dict[str, list[float]] = {name: [] for name in networks}
    for i in range(rounds + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            network(**arguments)
            if i:
                found[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def lowered(model: QuantizedModel, *, batch: int) -> tuple[DropIn | None, str]:
    """The network on int8 kernels, or why there is none here: what runs none of them is float by another name."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=re.escape(NO_INT8))  # the page says it of every layer
            low = model.lower("cpu", precision="float32", batch=batch)
    except TFMQError as error:
        return None, str(error)
    if low.report["lowering"]["flops"]["int8"]:
        return low, ""
    log.warning("report: no int8 kernels are timed: %s.", NO_INT8)
    return None, f"{NO_INT8}."
