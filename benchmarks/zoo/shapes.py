"""Draw captioned images of shapes by formula, and judge without training what an image shows.

An image is one upright shape of one colour on a dark background, 32x32. Its caption names size, colour and
shape; its position and exact radius are random. The judge redraws the image from its measurements.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

IMAGE_SIZE = 32
SIZES = {"small": (3.5, 5.0), "large": (7.5, 9.0)}  # radius, in pixels, of the circle with the same area
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 1.0, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 1.0, 0.1),
}
SHAPES = ("circle", "square", "triangle")
PROMPTS = [f"a {size} {colour} {shape}" for size, colour, shape in itertools.product(SIZES, COLOURS, SHAPES)]
BACKGROUND = 0.1  # of each channel, from 0 to 1
CLOSE = 20.0  # the PSNR in dB to the judge's redrawing that an image needs

# Half side of the square, and circumradius of the triangle, with the area of the circle of radius 1.
SQUARE, TRIANGLE = math.sqrt(math.pi) / 2, math.sqrt(4 * math.pi / (3 * math.sqrt(3)))
# The extent of each shape of radius 1 from its centroid: left and right, up, down.
REACH = torch.tensor(
    [[1, 1, 1], [SQUARE, SQUARE, SQUARE], [TRIANGLE * math.sqrt(3) / 2, TRIANGLE, TRIANGLE / 2]]
)


def paint(shape_N: Tensor, colour_N: Tensor, radius_N: Tensor, x_N: Tensor, y_N: Tensor) -> Tensor:
    """Return images (N, 3, 32, 32) in [-1, 1] of shapes with centroids (x, y), in pixels from the top left."""
    grid = torch.arange(IMAGE_SIZE) + 0.5
    dx, dy, r = (grid - x_N[:, None])[:, None, :], (grid - y_N[:, None])[:, :, None], radius_N[:, None, None]
    slope = dx.abs() * math.sqrt(3) / 2 - dy / 2  # of the triangle's two upper sides
    # Distances to the outline in pixels, negative inside. Outside a corner they are too short, which rounds it
    # less.
    distances = torch.stack([
        (dx**2 + dy**2).sqrt() - r,
        torch.maximum(dx.abs(), dy.abs()) - r * SQUARE,
        torch.maximum(slope, dy) - r * TRIANGLE / 2,
    ])  # fmt: skip
    cover = (0.5 - distances[shape_N, torch.arange(len(shape_N))]).clamp(0, 1)[:, None]
    ink = torch.tensor(list(COLOURS.values()))[colour_N][:, :, None, None]
    return (BACKGROUND + cover * (ink - BACKGROUND)) * 2 - 1


def draw(caption_N: Tensor, *, seed: int) -> Tensor:
    """Return images (N, 3, 32, 32) in [-1, 1] of captions (indices into PROMPTS), wholly inside the frame."""
    generator = torch.Generator().manual_seed(seed)
    size_N, rest = caption_N // 12, caption_N % 12
    low, high = torch.tensor(list(SIZES.values()))[size_N].unbind(1)
    u_3N = torch.rand(3, len(caption_N), generator=generator)
    radius = low + u_3N[0] * (high - low)
    side, up, down = (REACH[rest % 3] * radius[:, None] + 1).unbind(1)
    x = side + u_3N[1] * (IMAGE_SIZE - 2 * side)
    y = up + u_3N[2] * (IMAGE_SIZE - up - down)
    return paint(rest % 3, rest // 3, radius, x, y)


def judge(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each image shows, as an index into PROMPTS (N,), and the PSNR (N,) in dB to its redrawing.

    The covered area gives the radius and the size; its centroid gives the position. Shape and colour are
    those whose drawing comes closest. A blurred, doubled or broken shape is not close to any drawing.
    """
    images = (images_NCHW + 1) / 2
    # Double the contrast, so that faint background noise does not count as covered, and edges stay in place.
    cover_NHW = ((images.amax(1) - BACKGROUND) / (1 - BACKGROUND) * 2 - 0.5).clamp(0, 1)
    area_N = cover_NHW.sum((1, 2)).clamp(min=1)
    grid = torch.arange(IMAGE_SIZE) + 0.5
    x_N, y_N = (cover_NHW.sum(1) * grid).sum(1) / area_N, (cover_NHW.sum(2) * grid).sum(1) / area_N
    radius_N = (area_N / math.pi).sqrt()
    errors = []
    for colour, shape in itertools.product(range(len(COLOURS)), range(len(SHAPES))):
        label_N = torch.zeros(len(images), dtype=torch.long)
        redrawn = paint(label_N + shape, label_N + colour, radius_N, x_N, y_N)
        errors.append((images_NCHW - redrawn).square().mean((1, 2, 3)))
    error_N, rest_N = torch.stack(errors).min(0)
    boundary = (SIZES["small"][1] + SIZES["large"][0]) / 2
    return rest_N + 12 * (radius_N > boundary), 10 * torch.log10(4 / error_N.clamp(min=1e-12))


def as_asked(images_NCHW: Tensor, caption_N: Tensor) -> Tensor:
    """Return a mask (N,) of the images that closely match their caption."""
    label_N, psnr_N = judge(images_NCHW)
    return (label_N == caption_N) & (psnr_N > CLOSE)
