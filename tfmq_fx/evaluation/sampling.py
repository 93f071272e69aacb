"""Pictures from a pipeline with one denoiser or another, from the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.pipelines import denoiser, run_pipeline


@contextmanager
def swapped(pipe: Any, network: nn.Module) -> Iterator[Any]:
    """The pipeline with its denoiser replaced for a while."""
    name = next(n for n, m in pipe.components.items() if m is denoiser(pipe))
    original = getattr(pipe, name)
    setattr(pipe, name, network)
    try:
        yield pipe
    finally:
        setattr(pipe, name, original)


def sample(
    pipe: Any,
    network: nn.Module | None = None,
    *,
    num_samples: int,
    num_inference_steps: int,
    seed: int,
    batch_size: int = 256,
    **pipe_kwargs: Any,
) -> Tensor:
    """Images (N, C, H, W) in [-1, 1]. The noise depends on seed, num_samples and batch_size, not on the network."""
    images = []
    generator = torch.Generator().manual_seed(seed)
    with swapped(pipe, network or denoiser(pipe)):
        for start in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - start)
            drawn = run_pipeline(
                pipe,
                size,
                first=start,
                num_inference_steps=num_inference_steps,
                generator=generator,
                **pipe_kwargs,
            )
            images.append(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(images)


def save_grid(columns: Sequence[tuple[str, Tensor]], file: Path, *, per_row: int = 8) -> None:
    """A PNG with one titled grid of images per column, side by side. Raises TFMQError when it cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TFMQError(
            f'{file}: pictures need matplotlib ({error}); pip install "tfmq_fx[report]".'
        ) from error

    rows = -(-len(columns[0][1]) // per_row)
    figure = Figure(figsize=(3.2 * len(columns), 3.2 * rows / per_row + 0.4), dpi=120)
    FigureCanvasAgg(figure)
    for i, (title, images) in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), i + 1)
        axes.imshow(_tile(images, per_row).clamp(-1, 1).add(1).div(2).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.tight_layout(pad=0.4)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png")
        temporary.replace(file)
    except OSError as error:
        raise TFMQError(f"{file}: cannot be written ({error.strerror}).") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _tile(images_NCHW: Tensor, per_row: int) -> Tensor:
    """(rows * H, per_row * W, C), or (.., ..) for one channel, with a one-pixel frame; empty cells are black."""
    padded = torch.nn.functional.pad(images_NCHW, (1, 1, 1, 1), value=-1.0)
    missing = -len(padded) % per_row
    padded = torch.cat([padded, padded.new_full((missing, *padded.shape[1:]), -1.0)])
    n, c, h, w = padded.shape
    grid = (
        padded.reshape(n // per_row, per_row, c, h, w)
        .permute(0, 3, 1, 4, 2)
        .reshape(n // per_row * h, per_row * w, c)
    )
    return grid[..., 0] if c == 1 else grid
