"""One page that shows what was quantized how, and when and where it drifts: HTML, PNG and JSON."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq_fx.calibration import CalibrationSet
from tfmq_fx.drift import (
    Trajectory,
    in_bfloat16,
    lowered,
    milliseconds,
    nearest_of,
    output_errors,
    trajectory,
)
from tfmq_fx.errors import TFMQError
from tfmq_fx.extractors import Extractor, compare
from tfmq_fx.model import QuantizedModel
from tfmq_fx.recording import denoiser
from tfmq_fx.saving import finite_json, replace_folder

PAGE, NUMBERS = "report.html", "report.json"
SHOWN_STEPS = 6  # of a trajectory
INK = "#010203"  # a colour no plot has: in the page's drawings it becomes the page's own text colour
OURS, NEAREST, FLOOR = "quantized", "round to nearest", "float in bfloat16"


def require_packages(what: str) -> None:
    """Raise a TFMQError that says how to get the packages for plots, pictures and pages when they are not there."""
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
    num_inference_steps: int = 50,
    seed: int = 0,
    nearest: bool = True,
    extractor: Extractor | None = None,
    command: str = "",
    **pipe_kwargs: Any,
) -> tuple[dict[str, Any], dict[str, Trajectory]]:
    """The report's numbers (plain JSON values), and the trajectories of the float and the quantized network.

    nearest: also calibrate the recipe with round-to-nearest, to compare with. Raises TFMQError for a pipeline whose
    denoiser does not fit the model.
    """
    network = denoiser(pipe, timestep=model.interface.timestep)
    settings: dict[str, Any] = {
        "num_samples": num_samples,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
    }
    data = CalibrationSet.record(pipe, timestep=model.interface.timestep, **settings, **pipe_kwargs)
    runs = {  # first: a pipeline that does not fit is known before minutes of calibration
        name: trajectory(pipe, model, module, **settings, **pipe_kwargs)
        for name, module in (("float", network), (OURS, model))
    }
    networks: dict[str, Callable[..., Any]] = {OURS: model, FLOOR: in_bfloat16(network)}
    if nearest:
        networks[NEAREST] = nearest_of(pipe, model, data)
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
    """Relative MSE of what the networks are given, call by call: how far the trajectories are apart."""
    return [
        {"timestep": t, "relative_mse": float((y - x).square().mean() / x.square().mean())}
        for t, x, y in zip(a.timesteps, a.inputs, b.inputs, strict=True)
    ]


def write_report(
    numbers: Mapping[str, Any], runs: Mapping[str, Trajectory], folder: Path, *, title: str
) -> None:
    """report.html, which needs nothing else; the same plots as PNG and the same numbers as report.json.

    The folder is written whole or not at all; one that holds anything else is refused.
    """
    require_packages("report")
    names = {PAGE, NUMBERS, *(f"{name}.png" for name in (*PLOTS, "trajectory"))}
    if folder.exists() and not (folder.is_dir() and {f.name for f in folder.iterdir()} <= names):
        raise TFMQError(f"{folder}: holds something else; choose another folder or remove it yourself.")

    def write(temporary: Path) -> None:
        (temporary / NUMBERS).write_text(json.dumps(finite_json(numbers), indent=1) + "\n")
        drawn = {}
        for name, draw in PLOTS.items():
            figure = draw(numbers, "black")
            if figure is not None:
                figure.savefig(temporary / f"{name}.png", dpi=144)
                drawn[name] = _svg(draw(numbers, INK))
        strip = _strip(runs["float"], runs[OURS])
        _png(strip["all"], temporary / "trajectory.png")
        page = _template().render(
            title=title,
            n=numbers,
            q=numbers["quantization"],
            plots=drawn,
            strip={name: _data_uri(x) for name, x in strip.items() if name != "all"},
            steps=[runs["float"].timesteps[i] for i in _shown(runs["float"])],
            groups=_groups(numbers["quantization"]["layers"]),
        )
        (temporary / PAGE).write_text(page, encoding="utf-8")

    replace_folder(folder, write)


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("tfmq_fx") / "report.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)


def _groups(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any, Any, bool, int]]:
    """Layers that are quantized alike: operator, weight and activation bits, temporal, how many."""
    counts: dict[tuple[str, Any, Any, bool], int] = {}
    for layer in layers:
        key = (layer["op"], layer["weight_bits"], layer["activation_bits"], bool(layer["temporal"]))
        counts[key] = counts.get(key, 0) + 1
    return [(*key, count) for key, count in sorted(counts.items(), key=str)]


# Plots: matplotlib, on a transparent ground; `ink` colours text and axes.


def _figure(ink: str, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(colors=ink, which="both")
    for spine in axes.spines.values():
        spine.set_color(ink)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(ink)
    axes.set_facecolor("none")
    return figure, axes


def plot_drift(numbers: Mapping[str, Any], ink: str) -> Any:
    """Heat map: cosine distance of every temporal feature at every timestep, logarithmic."""
    drift = numbers["temporal_drift"]
    if drift is None:
        return None
    from matplotlib.colors import LogNorm

    values = np.maximum(np.array(drift["cosine_distance"]), 1e-12)
    figure, axes = _figure(ink, 1.2 + 0.22 * len(values))
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm())
    axes.set_yticks(range(len(values)), drift["features"], fontsize=7)
    step = max(1, len(drift["timesteps"]) // 10)
    ticks = range(0, len(drift["timesteps"]), step)
    axes.set_xticks(ticks, [f"{drift['timesteps'][i]:g}" for i in ticks], fontsize=8)
    axes.set_xlabel("timestep")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("cosine distance to float", color=ink)
    bar.ax.tick_params(colors=ink, which="both")
    return figure


def plot_output_errors(numbers: Mapping[str, Any], ink: str) -> Any:
    """Lines: relative MSE of the network's output by timestep, on the float trajectory."""
    figure, axes = _figure(ink, 3.4)
    for name, errors in numbers["output_errors"].items():
        points = sorted((float(t), e) for t, e in errors.items())
        axes.plot(*zip(*points, strict=True), label=name, marker=".", linewidth=1.5)
    return _finished(figure, axes, ink, "relative MSE of the output")


def plot_trajectory_errors(numbers: Mapping[str, Any], ink: str) -> Any:
    """Line: how far x_t of the quantized run is from that of the float run, from the same noise."""
    figure, axes = _figure(ink, 2.8)
    points = [
        (e["timestep"], e["relative_mse"]) for e in numbers["trajectory_errors"] if e["relative_mse"] > 0
    ]
    if points:
        axes.plot(*zip(*points, strict=True), label=OURS, marker=".", linewidth=1.5)
    return _finished(figure, axes, ink, "relative MSE of x_t")


def _finished(figure: Any, axes: Any, ink: str, label: str) -> Any:
    axes.set_yscale("log")
    axes.invert_xaxis()  # time runs to the right, from noise to picture
    axes.set_xlabel("timestep")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False, labelcolor=ink)
    return figure


PLOTS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    "drift": plot_drift,
    "output_errors": plot_output_errors,
    "trajectory_errors": plot_trajectory_errors,
}


def _svg(figure: Any) -> str:
    """Markup to stand inside a page: the page's text colour, no fixed size."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tfmq_fx"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    markup = text.getvalue()
    return markup[markup.index("<svg") :].replace(INK, "currentColor")


# Pictures: rows of small images.


def _shown(run: Trajectory) -> list[int]:
    """Which calls of a trajectory are shown, evenly from first to last."""
    count = min(SHOWN_STEPS, len(run.inputs))
    return sorted({round(i * (len(run.inputs) - 1) / max(1, count - 1)) for i in range(count)})


def _strip(a: Trajectory, b: Trajectory, *, rows: int = 4) -> dict[str, Tensor]:
    """Pictures (H, W, 3) in [0, 1]: float, quantized, and ten times their difference, at the shown calls and the end."""
    shown = [
        (_colour(x.inputs[i][:rows]), _colour(y.inputs[i][:rows])) for i in _shown(a) for x, y in [(a, b)]
    ]
    shown.append((_colour(a.images[:rows]), _colour(b.images[:rows])))
    size = shown[-1][0].shape[-1]
    columns: dict[str, list[Tensor]] = {"float": [], OURS: [], "difference x 10": []}
    for x, y in shown:
        scale = max(1.0, float(x.abs().max()) / 2)  # x_t leaves [-1, 1]
        pictures = (x / scale, y / scale, (y - x) * 10 / scale)
        for column, picture in zip(columns.values(), pictures, strict=True):
            column.append(torch.nn.functional.interpolate(picture, size=(size, size)))
    found = {name: _tiled(column) for name, column in columns.items()}
    return {**found, "all": torch.cat(list(found.values()))}


def _colour(x: Tensor) -> Tensor:
    """(N, 3, H, W): three channels as they are, the first of any other number; tokens (N, L, C) as a grey map."""
    if x.dim() == 3:
        x = x[:, None]
    return x[:, :3] if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)


def _tiled(pictures: Sequence[Tensor]) -> Tensor:
    """(H, W, 3) in [0, 1]: samples downwards, steps to the right, a frame of one pixel."""
    columns = [torch.nn.functional.pad(p, (1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(0, 1) for p in pictures]
    return torch.cat(columns, dim=1).add(1).div(2).clamp(0, 1)


def _png(image_HW3: Tensor, file: Any) -> None:
    from matplotlib.image import imsave

    imsave(file, image_HW3.numpy(), format="png")


def _data_uri(image_HW3: Tensor) -> str:
    data = io.BytesIO()
    _png(image_HW3, data)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
