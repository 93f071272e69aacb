"""Write a page that shows what was quantized and how, and when and where it drifts: HTML, PNG and JSON."""

from __future__ import annotations

import json
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.base.arithmetic import NO_INT8
from tfmq_fx.base.errors import TFMQError, require_type
from tfmq_fx.base.files import finite_json, replace_folder, require_writable
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.pipelines import denoiser, usual_steps
from tfmq_fx.evaluation.extractors import Extractor, compare
from tfmq_fx.evaluation.plots import FLOOR, INK, NEAREST, OURS, PLOTS, data_uri, shown_steps, strip, svg
from tfmq_fx.evaluation.sampling import require_made_of
from tfmq_fx.evaluation.trajectories import (
    Trajectory,
    in_bfloat16,
    log,
    milliseconds,
    output_errors,
    trajectory,
)
from tfmq_fx.model import QuantizedModel
from tfmq_fx.pipeline import quantize
from tfmq_fx.recipe import Recipe


def nearest_of(network: nn.Module, model: QuantizedModel, data: CalibrationSet) -> QuantizedModel:
    """Quantize with the same recipe by round-to-nearest alone, calibrated on the given data.

    Reconstruction is measured against the result.
    """
    recipe = Recipe.from_json(model.recipe)
    plain = replace(recipe.reconstruction, method="nearest", temporal_method="nearest")
    return quantize(
        network,
        replace(recipe, reconstruction=plain),
        calibration=data,
        timestep=model.interface.timestep,
        finite=model.finite,
    )


def lowered(model: QuantizedModel, *, batch: int) -> tuple[DropIn | None, str]:
    """Return the network on int8 kernels, or None and the reason why there is none here.

    A lowered network that runs no int8 kernel counts as none: it would only be float by another name.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=re.escape(NO_INT8))  # the page says it for every layer
            low = model.lower("cpu", precision="float32", batch=batch)
    except TFMQError as error:
        return None, str(error)
    if low.report["lowering"]["flops"]["int8"]:
        return low, ""
    log.warning("report: no int8 kernels are timed: %s.", NO_INT8)
    return None, f"{NO_INT8}."


PAGE, NUMBERS = "report.html", "report.json"


def require_packages(what: str) -> None:
    """Raise a TFMQError that says how to install the packages for plots and pages, if one is missing.

    what: the name of what needs them, for the message.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TFMQError(f'{what}: a package is missing ({error}); pip install "tfmq_fx[report]".') from error


def measure(
    pipe: Any,
    model: QuantizedModel,
    *,
    num_samples: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    nearest: bool = True,
    extractor: Extractor | None = None,
    command: str = "",
    component: str | None = None,
    **pipe_kwargs: Any,
) -> tuple[dict[str, Any], dict[str, Trajectory]]:
    """Return the report's numbers (plain JSON) and the trajectories of the float and the quantized network.

    num_inference_steps: None for 50, or the number that a pipeline has which takes none.
    nearest: also calibrate the recipe with round-to-nearest, for comparison.
    extractor: gives features of pictures, for the distances in `compare`.
    command: the command that makes the report, to be shown in it.
    component: the name of the pipeline's denoiser, if several components take a timestep.
    pipe_kwargs: passed to the pipeline's call.

    Raises TFMQError for a pipeline whose denoiser does not fit the model.
    """
    require_type(model, QuantizedModel, "model", "give what tfmq_fx.quantize returns")
    timestep = model.interface.timestep
    network = denoiser(pipe, timestep=timestep, component=component)
    require_made_of(model, network)
    settings: dict[str, Any] = {
        "num_samples": num_samples,
        "num_inference_steps": usual_steps(pipe) if num_inference_steps is None else num_inference_steps,
        "seed": seed,
    }
    data = CalibrationSet.record(pipe, timestep=timestep, component=component, **settings, **pipe_kwargs)
    runs = {  # first, so that a pipeline that does not fit fails before minutes of calibration
        name: trajectory(pipe, model, module, component=component, **settings, **pipe_kwargs)
        for name, module in (("float", network), (OURS, model))
    }
    networks: dict[str, Callable[..., Any]] = {OURS: model, FLOOR: in_bfloat16(network)}
    if nearest:
        networks[NEAREST] = nearest_of(network, model, data)
    batch = min(2, num_samples)
    low, no_kernels = lowered(model, batch=batch)
    timed: dict[str, Callable[..., Any]] = {"float": network, OURS: model}
    if low is not None:
        timed["int8 kernels"] = low
    report = model.report
    drift = report.get("temporal_drift")
    return {
        "command": command,
        "quantized_by": report.get("command", ""),
        "settings": {**settings, **{k: v for k, v in pipe_kwargs.items() if _is_plain(v)}},
        "versions": {n: version(n) for n in ("tfmq_fx", "torch", "torchao", "diffusers")},
        "machine": {
            "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "quantization": report,
        "temporal_drift": drift,
        "output_errors": output_errors(network, networks, data),
        "trajectory_errors": _along(runs["float"], runs[OURS]),
        "pictures": compare(runs[OURS].images, runs["float"].images, extractor=extractor),
        "milliseconds": {"batch": batch, **milliseconds(timed, data, batch=batch)},
        "kernels": {"missing": no_kernels} if low is None else low.report["lowering"],
    }, runs


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, list, tuple))


def _along(a: Trajectory, b: Trajectory) -> list[dict[str, float]]:
    """Return the relative MSE of the networks' inputs, call by call: how far apart the trajectories are."""
    return [
        {"timestep": t, "relative_mse": float((y - x).square().mean() / x.square().mean())}
        for t, x, y in zip(a.timesteps, a.inputs, b.inputs, strict=True)
    ]


def check_report_folder(folder: Path) -> None:
    """Raise TFMQError when `folder` cannot be written, or exists and holds anything but a report."""
    require_writable(folder)
    names = {PAGE, NUMBERS, *(f"{name}.png" for name in (*PLOTS, "trajectory"))}
    if folder.exists() and not (folder.is_dir() and {f.name for f in folder.iterdir()} <= names):
        raise TFMQError(f"{folder}: holds something else; choose another folder or remove it yourself.")


def write_report(
    numbers: Mapping[str, Any], runs: Mapping[str, Trajectory], folder: Path, *, title: str
) -> None:
    """Write report.html, which needs no other file, its plots as PNG, and its numbers as report.json.

    The folder is written whole or not at all. Raises TFMQError if it holds anything else.

    numbers, runs: as `measure` returns them.
    """
    from torchvision.utils import save_image

    require_packages("report")
    check_report_folder(folder)

    def write(temporary: Path) -> None:
        (temporary / NUMBERS).write_text(json.dumps(finite_json(numbers), indent=1) + "\n")
        drawn = {}
        for name, draw in PLOTS.items():
            figure = draw(numbers, "black")
            if figure is not None:
                figure.savefig(temporary / f"{name}.png", dpi=144)
                drawn[name] = svg(draw(numbers, INK))
        pictures = strip(runs["float"], runs[OURS])
        save_image(pictures["all"], temporary / "trajectory.png")
        page = _template().render(
            title=title,
            n=numbers,
            q=numbers["quantization"],
            plots=drawn,
            strip={name: data_uri(x) for name, x in pictures.items() if name != "all"},
            steps=[runs["float"].timesteps[i] for i in shown_steps(runs["float"])],
            groups=_groups(numbers["quantization"]["layers"]),
        )
        (temporary / PAGE).write_text(page, encoding="utf-8")

    replace_folder(folder, write)


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("tfmq_fx") / "report.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)


def _groups(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any, Any, bool, int]]:
    """Group the layers that are quantized alike: operator, weight bits, activation bits, temporal, count."""
    counts: dict[tuple[str, Any, Any, bool], int] = {}
    for layer in layers:
        key = (layer["op"], layer["weight_bits"], layer["activation_bits"], bool(layer["temporal"]))
        counts[key] = counts.get(key, 0) + 1
    return [(*key, count) for key, count in sorted(counts.items(), key=str)]
