"""Strips of pictures: what stands where, and in which shade."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from tfmq_fx.evaluation.plots import data_uri, strip
from tfmq_fx.evaluation.trajectories import Trajectory


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
