"""Read real images from a folder in the format of a pipeline's samples: its size and channels, in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tfmq_fx.base.errors import TFMQError

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}  # channels -> PIL's name


def images_from(
    folder: str | Path,
    *,
    size: int | Sequence[int],
    channels: int = 3,
    num: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the images (N, C, H, W), in [-1, 1], of a folder and its subfolders (such as one per class).

    size: of the result in pixels, (H, W) or one number for both. Images are scaled to cover it (bilinear,
        with antialiasing) and centre-cropped.
    channels: 1 (grey) or 3.
    num: the number of images, drawn by `seed`; None: all, in the order of their names.

    Raises TFMQError if the folder is missing or has fewer images, if a file is not an image (naming it), or
    for any other number of channels.
    """
    from torchvision.transforms.v2 import functional

    if channels not in MODES:
        raise TFMQError(f"{folder}: images can be read with 1 channel or 3, not {channels}.")
    height, width = (size, size) if isinstance(size, int) else size
    found = []
    for file in image_files(folder, num=num, seed=seed):
        pixels = functional.pil_to_tensor(_read(file, MODES[channels]))
        scale = max(height / pixels.shape[1], width / pixels.shape[2])
        covering = [max(n, round(scale * m)) for n, m in zip((height, width), pixels.shape[1:], strict=True)]
        pixels = functional.center_crop(functional.resize(pixels, covering, antialias=True), [height, width])
        found.append(functional.to_dtype(pixels, torch.float32, scale=True) * 2 - 1)
    return torch.stack(found)


def image_files(folder: str | Path, *, num: int | None = None, seed: int = 0) -> list[Path]:
    """Return the files that `images_from` reads, by suffix. Raises the same errors about the folder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    if not Path(folder).is_dir():
        raise TFMQError(f"{folder}: no such folder of images.")
    entries = make_dataset(
        str(folder), {"": 0}, IMG_EXTENSIONS, allow_empty=True
    )  # a single class: the folder itself
    files = sorted(Path(file) for file, _ in entries)
    if not files:
        raise TFMQError(f"{folder}: the folder has no images ({', '.join(IMG_EXTENSIONS)}).")
    if num is None:
        return files
    if num > len(files):
        raise TFMQError(f"{folder}: the folder has {len(files)} images, but {num} were asked for.")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    return [files[i] for i in order[:num].tolist()]


def check_images(folder: str | Path, *, num: int | None = None, seed: int = 0) -> None:
    """Read the files of `images_from` and discard them, to raise its errors before hours of other work."""
    for file in image_files(folder, num=num, seed=seed):
        _read(file, "RGB")


def _read(file: Path, mode: str) -> Image.Image:
    """Return the decoded image in one of PIL's modes. Raises TFMQError, naming the file, if that fails."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert(mode)
    except Exception as error:  # PIL's readers raise many types
        raise TFMQError(f"{file}: cannot be read as an image ({type(error).__name__}).") from error
