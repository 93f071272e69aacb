"""Networks whose temporal features are cached or reconstructed. Each is prepared once."""

import dataclasses
import functools

import torch
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import (
    TIMESTEPS,
    Labelled,
    TinyUNet,
    calibration,
    labelled_data,
    make,
    sinusoid,
)
from tests.helpers.nearest import recipe
from tfmq_fx.calibration.temporal_rows import run_temporal
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.graph.state import set_state
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.passes import extract_temporal
from tfmq_fx.passes.quantize.state import state_of, temporal_of

NEAREST = tfmq_fx.Reconstruction(method="nearest")
W4A8 = tfmq_fx.Recipe(reconstruction=NEAREST)
FINITE = {"class_labels": range(Labelled.classes)}


class Nested(nn.Module):
    """A feature that another layer of the block reads, as with one embedding for every block.

    It also has an in-place operator.
    """

    def __init__(self):
        super().__init__()
        self.time1, self.time2, self.all = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 8)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.mid = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timestep):
        emb = self.time2(F.silu(self.time1(sinusoid(timestep, 8)), inplace=True))
        shift, scale = self.all(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.mid(F.silu(self.conv1(sample) * (1 + scale) + shift))
        return self.conv2(h + F.silu(emb)[:, :, None, None])


class Guided(nn.Module):
    """Two features of only the timestep, and one that also depends on a guidance scale without a table."""

    def __init__(self):
        super().__init__()
        self.time, self.guidance = nn.Linear(8, 16), nn.Linear(1, 16)
        self.emb1, self.emb2, self.emb3 = nn.Linear(16, 4), nn.Linear(16, 4), nn.Linear(16, 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.mid = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timestep, guidance):
        t = self.time(sinusoid(timestep, 8))
        emb, both = F.silu(t), F.silu(t + self.guidance(guidance[:, None]))
        h = F.silu(self.conv1(sample) + self.emb1(emb)[:, :, None, None] + self.emb2(both)[:, :, None, None])
        return self.conv2(F.silu(self.mid(h) + self.emb3(emb)[:, :, None, None]))


class Scaled(nn.Module):
    """An output whose columns are divided by functions of the timestep: a feature without weights."""

    def __init__(self):
        super().__init__()
        self.time, self.emb = nn.Linear(8, 16), nn.Linear(16, 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample, timestep):
        emb = self.emb(F.silu(self.time(sinusoid(timestep, 8))))
        h = self.conv2(F.silu(self.conv1(sample) + emb[:, :, None, None]))
        return h / divisors(timestep, h.shape[-1])[:, None, None]


def divisors(timestep, columns):
    return torch.floor(timestep[:, None] / 7 + torch.arange(1, columns + 1))


class Divided(nn.Module):
    """An output divided by one number for each timestep, and nothing else that depends on it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample, timestep):
        h = self.conv2(F.silu(self.conv1(sample)))
        return h / torch.floor(timestep / 7 + 1)[:, None, None, None]


def guided_data():
    tensors = calibration().tensors
    guidance = torch.rand(40, generator=torch.Generator().manual_seed(1))
    return tfmq_fx.CalibrationSet.from_tensors({**tensors, "guidance": guidance})


DATA = {
    TinyUNet: calibration,
    Scaled: calibration,
    Divided: calibration,
    Nested: calibration,
    Labelled: labelled_data,
    Guided: guided_data,
}


@functools.cache
def once(network, bits="w4a8", keyed="block"):
    data = DATA[network]()
    gm = tfmq_fx.capture(make(network), data.arguments(slice(0, 2)))
    finite = FINITE if network is Labelled else None
    return tfmq_fx.calibrate(
        tfmq_fx.prepare(gm, recipe(bits, keyed), timesteps=TIMESTEPS, finite=finite), data
    )


def prepared(network=TinyUNet, bits="w4a8", keyed="block", **changes):
    """Return a calibrated graph that the caller may change, with these changes to its recipe."""
    gm = fresh(once(network, bits, keyed))
    state = state_of(gm)
    set_state(gm, dataclasses.replace(state, recipe=dataclasses.replace(state.recipe, **changes)))
    return gm


def maintained(network=TinyUNet, **changes):
    gm = maintain(prepared(network, **changes), DATA[network]())
    return tfmq_fx.convert(gm)


def block_of(gm):
    return extract_temporal(gm, temporal_of(gm))


def features(gm, **rows):
    block = gm.get_submodule("temporal_block") if state_of(gm).stage == "converted" else block_of(gm)
    return run_temporal(block, rows or {"timestep": TIMESTEPS})


@functools.cache
def quantized(maintenance="cache", **changes):
    recipe = dataclasses.replace(W4A8, maintain=maintenance, **changes)
    return tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration())


BATCH = calibration().tensors
