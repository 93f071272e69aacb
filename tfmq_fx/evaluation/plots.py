"""Draw the report's plots and strips of images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq_fx.evaluation.trajectories import Trajectory

SHOWN_STEPS = 6  # how many steps of a trajectory a strip shows


INK = "#010203"  # a colour that no plot uses, so that `svg` can replace it by the page's text colour


OURS, NEAREST, FLOOR = "quantized", "round to nearest", "float in bfloat16"


# Plots: by matplotlib, on a transparent background. `ink` is the colour of text and axes.


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
    """Draw a heat map: cosine distance of every temporal feature at every timestep, in log scale."""
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
    """Draw relative MSE of each network's output by timestep, on the float trajectory."""
    figure, axes = _figure(ink, 3.4)
    for name, errors in numbers["output_errors"].items():
        points = sorted((float(t), e) for t, e in errors.items())
        axes.plot(*zip(*points, strict=True), label=name, marker=".", linewidth=1.5)
    return _finished(figure, axes, ink, "relative MSE of the output")


def plot_trajectory_errors(numbers: Mapping[str, Any], ink: str) -> Any:
    """Draw relative MSE of the quantized run's x_t to the float run's, by timestep, from the same noise."""
    figure, axes = _figure(ink, 2.8)
    points = [
        (e["timestep"], e["relative_mse"]) for e in numbers["trajectory_errors"] if e["relative_mse"] > 0
    ]
    if points:
        axes.plot(*zip(*points, strict=True), label=OURS, marker=".", linewidth=1.5)
    return _finished(figure, axes, ink, "relative MSE of x_t")


def _finished(figure: Any, axes: Any, ink: str, label: str) -> Any:
    axes.set_yscale("log")
    axes.invert_xaxis()  # sampling goes from left to right, from noise to image
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


def svg(figure: Any) -> str:
    """Return the figure as inline SVG for a page, in the page's text colour."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tfmq_fx"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    markup = text.getvalue()
    return markup[markup.index("<svg") :].replace(INK, "currentColor")


# Strips: rows of small images.


def shown_steps(run: Trajectory) -> list[int]:
    """Return the indices of the calls to show, evenly spaced from first to last."""
    count = min(SHOWN_STEPS, len(run.inputs))
    return sorted({round(i * (len(run.inputs) - 1) / max(1, count - 1)) for i in range(count)})


def strip(a: Trajectory, b: Trajectory, *, rows: int = 4) -> dict[str, Tensor]:
    """Return strips (3, H, W) in [0, 1]: float, quantized, ten times their difference, and all three stacked.

    Each shows the first `rows` samples at the calls of `shown_steps` and at the end.
    """
    shown = [
        (_colour(x.inputs[i][:rows]), _colour(y.inputs[i][:rows]))
        for i in shown_steps(a)
        for x, y in [(a, b)]
    ]
    shown.append((_colour(a.images[:rows]), _colour(b.images[:rows])))
    size = shown[-1][0].shape[-1]
    columns: dict[str, list[Tensor]] = {"float": [], OURS: [], "difference x 10": []}
    for x, y in shown:
        scale = max(1.0, float(x.abs().max()) / 2)  # x_t leaves [-1, 1]
        pictures = (x / scale, y / scale, (y - x) * 10 / scale)
        for column, picture in zip(columns.values(), pictures, strict=True):
            column.append(torch.nn.functional.interpolate(picture, size=(size, size)))
    found = {name: _grid(column) for name, column in columns.items()}
    return {**found, "all": torch.cat(list(found.values()), dim=1)}


def _colour(x: Tensor) -> Tensor:
    """Return x as (N, 3, H, W) images.

    Three channels stay as they are; of any other number, the first is shown in grey. Tokens (N, L, C) become
    a grey map.
    """
    if x.dim() == 3:
        x = x[:, None]
    return x[:, :3] if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)


def _grid(pictures: Sequence[Tensor]) -> Tensor:
    """Return a grid (3, H, W) in [0, 1] on grey: one row per sample, one column per step."""
    from torchvision.utils import make_grid

    cells = torch.stack(list(pictures), dim=1).add(1).div(2).clamp(0, 1)  # (samples, steps, 3, h, w)
    grid: Tensor = make_grid(cells.flatten(0, 1), nrow=len(pictures), padding=1, pad_value=0.5)
    return grid


def data_uri(image_3HW: Tensor) -> str:
    """Return the data URI of an image in [0, 1], as a PNG."""
    from torchvision.utils import save_image

    data = io.BytesIO()
    save_image(image_3HW, data, format="png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
