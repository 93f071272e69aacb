"""Weights that outgrow memory are rewritten to files: the same bits."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.low_bits import data, graph
from tfmq_fx.base import offloaded
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.stage import input_maxima
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.passes import low_rank, rotate, smooth


def body():
    return nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def passes(gm):
    return [
        partial(smooth, maxima=input_maxima(gm, data(True))),
        partial(rotate, block=4),
        partial(low_rank, rank=1),
    ]


@pytest.mark.parametrize("number", range(3))
def test_rewritten_weights_lie_in_files_with_the_same_bits(monkeypatch, number):
    gm = graph(body, image=True)
    change, written, on_disk = passes(gm)[number], [], offloaded.on_disk
    in_memory = change(fresh(gm)).graph_module
    monkeypatch.setattr(offloaded, "on_disk", lambda x: written.append(x) or on_disk(x))
    change(fresh(gm))
    assert not written
    in_files = change(fresh(gm), max_memory=0.0).graph_module
    before = dict(gm.named_parameters())
    changed = [n for n, p in in_memory.named_parameters() if n in before and p is not before[n]]
    assert written
    assert len(written) >= len(changed) > 0
    for name, p in in_memory.named_parameters():
        assert torch.equal(p, in_files.get_parameter(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(TFMQError, match=r"rewritten weights need .* raise Reconstruction\.max_memory"):
        change(fresh(gm), max_memory=0.0)
