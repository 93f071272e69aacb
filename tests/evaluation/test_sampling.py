"""Samples as one picture."""

import torch

from tfmq_fx.evaluation.sampling import _tile


def test_grids_keep_the_order_and_pad_with_black():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 2) / 4
    grid = _tile(images, per_row=2)
    assert grid.shape == (8, 8)
    assert (grid[1, 1], grid[1, 5], grid[5, 1], grid[5, 5]) == (0.0, 0.25, 0.5, -1.0)
