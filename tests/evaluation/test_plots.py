"""Grids and strips of pictures: what stands where, and in which shade."""

import base64
import io
import sys

import numpy as np
import torch
from PIL import Image

from tfmq_fx.evaluation.plots import data_uri, strip
from tfmq_fx.evaluation.sampling import MARGIN, TITLE_SIZE, save_grid
from tfmq_fx.evaluation.trajectories import Trajectory

TOP = 2 * TITLE_SIZE


def opened(file):
    with Image.open(file) as image:
        return image.convert("RGB")


def shades(picture, box):
    """The colours inside a box (left, top, right, bottom) of a picture."""
    return {tuple(c) for c in np.asarray(picture.crop(box)).reshape(-1, 3).tolist()}


def test_a_grid_keeps_the_order_and_pads_with_black(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not needed
    images = torch.tensor([-0.5, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 100, 100)
    save_grid([("a", images), ("b", -images)], tmp_path / "new" / "grid.png", per_row=2)
    whole = opened(tmp_path / "new" / "grid.png")
    scale, side = 2, 203  # 384 pixels are about twice 203
    assert whole.size == (2 * (scale * side + MARGIN), scale * side + TOP)
    cells = {(0, 0): (64, 191), (0, 1): (128, 128), (1, 0): (255, 0), (1, 1): (0, 0)}
    for (row, column), pair in cells.items():
        for which, shade in enumerate(pair):
            left = which * whole.width // 2 + MARGIN // 2 + scale * (1 + 101 * column)
            top = TOP + scale * (1 + 101 * row)
            assert shades(whole, (left, top, left + 200, top + 200)) == {(shade,) * 3}
    titles = shades(whole, (0, 0, whole.width, TOP))
    assert {(255, 255, 255), (0, 0, 0)} <= titles


def test_grids_of_one_image_of_colours_of_other_channels_and_of_large_images(tmp_path):
    for number, channels, size in ((1, 1, 8), (2, 3, 8), (3, 4, 8), (2, 2, 8), (9, 3, 100)):
        save_grid([("x" * 200, torch.zeros(number, channels, size, size))], tmp_path / "grid.png")
        whole = opened(tmp_path / "grid.png")
        assert whole.width >= min(number, 8) * size + MARGIN
        assert (128, 128, 128) in shades(whole, (0, TOP, whole.width, whole.height))
    assert [f.name for f in tmp_path.iterdir()] == ["grid.png"]


def run(shift, size=4, steps=3):
    """A trajectory of two samples: at step i the first is i / 10, the second minus that; the images are 0.5."""
    inputs = [
        torch.tensor([i / 10 + shift, -i / 10 + shift]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
        for i in range(steps)
    ]
    images = torch.full((2, 3, size, size), 0.5 + shift)
    return Trajectory(timesteps=[3.0, 2.0, 1.0], inputs=inputs, images=images)


def test_a_strip_has_samples_downwards_and_steps_to_the_right():
    found = strip(run(0.0), run(0.02))
    assert list(found) == ["float", "quantized", "difference x 10", "all"]
    height, width = 2 * 5 + 1, 4 * 5 + 1  # cells of 4 pixels, frames of one
    assert all(found[name].shape == (3, height, width) for name in list(found)[:3])
    assert found["all"].shape == (3, 3 * height, width)
    assert torch.equal(found["all"][:, :height], found["float"])
    for step, (upper, lower) in enumerate([(0.5, 0.5), (0.55, 0.45), (0.6, 0.4), (0.75, 0.75)]):
        columns = found["float"][:, :, 1 + 5 * step : 5 + 5 * step]
        torch.testing.assert_close(columns[:, 1:5], torch.full((3, 4, 4), upper))
        torch.testing.assert_close(columns[:, 6:10], torch.full((3, 4, 4), lower))
        difference = found["difference x 10"][:, 1:5, 1 + 5 * step : 5 + 5 * step]
        torch.testing.assert_close(difference, torch.full((3, 4, 4), 0.6))
    assert (found["float"][:, ::5] == 0.5).all()


def test_an_address_holds_the_picture():
    picture = torch.rand(3, 5, 7)
    kind, _, data = data_uri(picture).partition(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.abs(pixels / 255 - picture.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
