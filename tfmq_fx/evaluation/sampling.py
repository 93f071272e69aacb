"""Sample images from a pipeline with any denoiser, always from the same noise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.artefact.plain import plain_config
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files
from tfmq_fx.calibration.pipelines import denoiser, given_steps, holders, run_pipeline, whole_lists

# The layout of `save_grid`, in pixels: approximate width of a grid, white space beside it, title font size.
WIDTH, MARGIN, TITLE_SIZE = 384, 16, 14


@contextmanager
def swapped(
    pipe: Any, network: nn.Module, *, timestep: str = "timestep", component: str | None = None
) -> Iterator[Any]:
    """Yield the pipeline with `network` as its denoiser; restore the original afterwards.

    timestep, component: as for `denoiser`.
    """
    own = denoiser(pipe, timestep=timestep, component=component)
    held = [(inner, name) for inner, name, _ in holders(pipe, own)]
    for inner, name in held:
        setattr(inner, name, network)
    try:
        yield pipe
    finally:
        for inner, name in held:
            setattr(inner, name, own)


def require_made_of(model: DropIn, network: nn.Module) -> None:
    """Raise TFMQError, naming what differs, if the configurations show that `model` was made of another network.

    Entries that only one of the two has, and private ones, differ between versions of diffusers. Weights are not compared.
    """
    known, own = (json.loads(json.dumps(c)) for c in (model.parts()["config"], plain_config(network)))
    shared = [n for n in known if n in own and (n == "_class_name" or not n.startswith("_"))]
    other = next((f"{n} {known[n]!r} instead of {own[n]!r}" for n in shared if known[n] != own[n]), "")
    if bool(known) != bool(own):
        other = "a configuration" if known else "no configuration"
    if other:
        raise TFMQError(
            f"the artefact is of another network than the pipeline's {type(network).__name__}: it has {other}; give the pipeline "
            "that was quantized."
        )


def sample(
    pipe: Any,
    network: nn.Module | None = None,
    *,
    num_samples: int,
    num_inference_steps: int | None,
    seed: int,
    batch_size: int = 256,
    timestep: str = "timestep",
    component: str | None = None,
    **pipe_kwargs: Any,
) -> Tensor:
    """Return images (N, C, H, W) in [-1, 1] from the pipeline with `network`, or its own denoiser for None.

    timestep, component: as for `denoiser`. The noise depends on seed, num_samples and batch_size, not on the network.
    """
    images = []
    # Asked of the pipeline as it is: it shows how the float network is called.
    whole = whole_lists(pipe, {**pipe_kwargs, **given_steps(num_inference_steps)})
    generator = torch.Generator().manual_seed(seed)
    network = network or denoiser(pipe, timestep=timestep, component=component)
    with swapped(pipe, network, timestep=timestep, component=component):
        for start in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - start)
            drawn = run_pipeline(
                pipe,
                size,
                first=start,
                whole=whole,
                generator=generator,
                **given_steps(num_inference_steps),
                **pipe_kwargs,
            )
            images.append(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(images)


def save_grid(columns: Sequence[tuple[str, Tensor]], file: Path, *, per_row: int = 8) -> None:
    """Write a PNG with one titled grid of images (N, C, H, W) in [-1, 1] per column, side by side.

    Small images are enlarged by whole factors. Raises TFMQError if the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.v2.functional import to_pil_image
    from torchvision.utils import make_grid

    font, pictures = ImageFont.load_default(TITLE_SIZE), []
    for title, images in columns:
        shown = images[:, : 3 if images.shape[1] >= 3 else 1]  # latents may have four channels
        pixels = (shown.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
        grid = to_pil_image(make_grid(pixels, nrow=per_row, padding=1))
        times = max(1, round(WIDTH / grid.width))
        grid = grid.resize((times * grid.width, times * grid.height), Image.Resampling.NEAREST)
        picture = Image.new("RGB", (grid.width + MARGIN, grid.height + 2 * TITLE_SIZE), "white")
        picture.paste(grid, (MARGIN // 2, 2 * TITLE_SIZE))
        middle = (picture.width / 2, TITLE_SIZE)
        ImageDraw.Draw(picture).text(middle, title, fill="black", font=font, anchor="mm")
        pictures.append(picture)
    whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    replace_files(file, lambda temporary: whole.save(temporary, format="png"))
