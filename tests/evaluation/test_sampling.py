"""Samples as one picture: grids side by side, what stands where, and in which shade."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.networks.pipelines import ddpm
from benchmarks.networks.small import ScalarTime, make
from tests.helpers.nearest import one_timestep
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.evaluation.sampling import MARGIN, TITLE_SIZE, require_made_of, sample, save_grid

TOP = 2 * TITLE_SIZE


def opened(file):
    with Image.open(file) as image:
        return image.convert("RGB")


def shades(picture, box):
    """The colours inside a box (left, top, right, bottom) of a picture."""
    return {tuple(c) for c in np.asarray(picture.crop(box)).reshape(-1, 3).tolist()}


def test_no_steps_are_refused():
    with pytest.raises(TFMQError, match="num_inference_steps: 0 is not positive"):
        sample(ddpm(), num_samples=1, num_inference_steps=0, seed=0)


def test_an_artefact_of_another_network_is_refused():
    pipe = ddpm()
    q = copy.deepcopy(one_timestep(ScalarTime))
    with pytest.raises(TFMQError, match=r"another network than the pipeline's UNet2DModel: it has no config"):
        require_made_of(q, pipe.unet)
    require_made_of(q, make(ScalarTime))
    same = {**pipe.unet.config, "_name_or_path": "elsewhere", "new": 1}
    q.register_to_config(**json.loads(json.dumps(same)))
    require_made_of(q, pipe.unet)
    q.register_to_config(in_channels=7)
    with pytest.raises(TFMQError, match="it has in_channels 7 instead of 3; give the pipeline that was"):
        require_made_of(q, pipe.unet)


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
