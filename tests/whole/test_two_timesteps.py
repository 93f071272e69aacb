"""Networks with two timesteps: one is named, and the other joins it as any condition does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, make, sinusoid
from tests.helpers.blocks import layer_paths
from tests.helpers.nearest import recipe
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes import find_temporal

ROWS = 40
BOUND = 0.03  # four layers of 8 bits; see tests/whole/test_styles.py


class Interval(nn.Module):
    """A flow map: from time t to time r, and both meet in one embedding."""

    def __init__(self):
        super().__init__()
        self.t, self.r, self.emb = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t, r):
        emb = self.emb(F.silu(self.t(sinusoid(t, 8)) + self.r(sinusoid(r, 8))))
        return self.last(F.silu(self.first(x) + emb[:, :, None, None]))


class Pair(Interval):
    """Two modalities: each timestep has an embedding and a layer of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(16, 4)

    def forward(self, x, t, r):
        scale = self.scale(F.silu(self.r(sinusoid(r, 8))))[:, :, None, None]
        h = self.first(x) * (1 + scale) + self.emb(F.silu(self.t(sinusoid(t, 8))))[:, :, None, None]
        return self.last(F.silu(h))


def rows():
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(ROWS, 1, 6, 6, generator=g),
        "t": TIMESTEPS.repeat(4),
        "r": TIMESTEPS[torch.randint(0, 10, (ROWS,), generator=g)],
    }


@pytest.mark.parametrize(
    ("network_class", "finite", "key"),
    [
        (Interval, {}, ("t",)),  # one scale for each t, over all r
        (Interval, {"r": TIMESTEPS}, ("t", "r")),  # one for each pair
        (Pair, {}, ("t",)),
    ],
)
def test_one_is_the_timestep_and_the_other_a_condition(network_class, finite, key):
    network, given = make(network_class), rows()
    data = tfmq_fx.CalibrationSet.from_tensors(given, timestep="t")
    q = tfmq_fx.quantize(network, recipe("w8a8"), calibration=data, timestep="t", finite=finite)
    (layer,) = (layer for layer in q.report["layers"] if layer["path"] == "emb.weight")
    assert layer["key"] == key
    depends = network_class is Interval and not finite
    assert any("depends on r, not declared finite" in n["reason"] for n in q.report["notes"]) == depends
    with torch.no_grad():
        expected, found = network(**given), q(**given)
    assert 1e-5 < (found - expected).norm() / expected.norm() < BOUND


def test_either_may_be_the_timestep():
    gm = tfmq_fx.capture(make(Pair), {n: x[:2] for n, x in rows().items()}, "r")
    assert layer_paths(gm, find_temporal(gm).features) == {"scale"}
    assert layer_paths(gm, find_temporal(gm, timestep="t").features) == {"emb"}


def test_the_choice_is_the_users():
    with pytest.raises(
        TFMQError, match="timestep: not named, and t and r could be it; name it with timestep="
    ):
        tfmq_fx.capture(make(Pair), {n: x[:2] for n, x in rows().items()})
