"""Measure where and when a quantized network departs from the float one, on stored rows and trajectories."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.base.metrics import first_tensor, relative_mse_by_timestep
from tfmq_fx.base.signatures import parameters_of
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.pipelines import given_steps, run_pipeline, whole_lists
from tfmq_fx.evaluation.sampling import swapped

log = logging.getLogger(__name__)


ROWS = 64  # rows per call when errors are measured


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The path of one network from noise to images."""

    timesteps: list[float]  # of each call of the network
    inputs: list[Tensor]  # x_t, the network's input at each call, (N, ...) each
    images: Tensor  # (N, C, H, W) in [-1, 1]


@torch.no_grad()
def trajectory(
    pipe: Any,
    model: DropIn,
    network: nn.Module,
    *,
    num_samples: int,
    num_inference_steps: int | None,
    seed: int,
    component: str | None = None,
    **pipe_kwargs: Any,
) -> Trajectory:
    """Sample with `network`, and keep every x_t that it is given.

    model: tells the names of the network's arguments. network: the float network or `model` itself.
    seed: of the noise. component: as for `denoiser`. pipe_kwargs: passed to the pipeline's call.

    A guided batch holds the rows of each picture more than once. Only the last `num_samples` rows are kept,
    which are the conditional ones.
    """
    names = list(model.interface.arguments)
    kept: list[tuple[float, Tensor]] = []
    # Asked before anything is kept: it takes short runs.
    whole = whole_lists(pipe, {**pipe_kwargs, **given_steps(num_inference_steps)})

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        t = torch.as_tensor(given[model.interface.timestep]).amax().item()
        kept.append((t, given[model.first_input][-num_samples:].clone()))

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with swapped(pipe, network, timestep=model.interface.timestep, component=component):
            drawn = run_pipeline(
                pipe,
                num_samples,
                whole=whole,
                generator=torch.Generator().manual_seed(seed),
                **given_steps(num_inference_steps),
                **pipe_kwargs,
            )
    finally:
        handle.remove()
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
    return Trajectory(timesteps=[t for t, _ in kept], inputs=[x for _, x in kept], images=images)


@torch.no_grad()
def output_errors(
    reference: nn.Module, networks: Mapping[str, Callable[..., Any]], data: CalibrationSet
) -> dict[str, dict[float, float]]:
    """Return the relative MSE of each network's output to the reference's, by timestep, on the same rows."""
    groups = data.groups(ROWS)
    expected = torch.cat([_output(reference, data, rows, reference) for rows in groups])
    t = data.row_timesteps[torch.cat(groups)]
    return {
        name: relative_mse_by_timestep(
            torch.cat([_output(f, data, rows, reference) for rows in groups]), expected, t
        )
        for name, f in networks.items()
    }


def _output(network: Callable[..., Any], data: CalibrationSet, rows: Tensor, beside: nn.Module) -> Tensor:
    of_rows = False
    if isinstance(network, nn.Module) and not isinstance(network, DropIn):
        network, of_rows = data.row_wise(network), True
    arguments = _arguments(data, rows, beside, rows_first=of_rows)
    return first_tensor(network(**arguments)).float()


def _arguments(
    data: CalibrationSet, rows: Tensor, network: nn.Module | None, *, rows_first: bool = False
) -> dict[str, Any]:
    """Return a network's arguments of these rows, for a call that returns plain tuples."""
    takes = network is not None and "return_dict" in parameters_of(network)
    found = data.arguments(rows, beside=network, rows_first=rows_first)
    return found | ({"return_dict": False} if takes else {})


def in_bfloat16(network: nn.Module) -> Callable[..., Any]:
    """Return the float network under autocast: its error is a floor that people accept without asking."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(network.parameters()).device.type, torch.bfloat16):
            return network(*args, **kwargs)

    return call


@torch.no_grad()
def milliseconds(
    networks: Mapping[str, Callable[..., Any]], data: CalibrationSet, *, batch: int, rounds: int = 7
) -> dict[str, float]:
    """Return the median wall time of each network's call, in milliseconds, at one batch size.

    The networks take turns for `rounds` rounds. A first call of each warms up and is not counted.
    """
    beside = next((n for n in networks.values() if isinstance(n, nn.Module)), None)
    arguments = _arguments(data, max(data.groups(batch), key=len), beside)
    found: dict[str, list[float]] = {name: [] for name in networks}
    for i in range(rounds + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            network(**arguments)
            if i:
                found[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}
