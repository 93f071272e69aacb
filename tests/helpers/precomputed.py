"""Networks without their temporal block. Each is precomputed once."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, Labelled, TinyUNet, make, sinusoid
from tests.helpers.maintenance import Guided
from tfmq_fx.artefact.outside import Outside

BETWEEN = 901  # not in TIMESTEPS


class Half(TinyUNet):
    """TinyUNet in any precision: the sinusoids are computed in float32, and cast."""

    def __init__(self):
        super().__init__()
        cast = self.time_mlp[0].register_forward_pre_hook
        cast(lambda layer, given: (given[0].to(layer.weight.dtype),))


class Wide(Guided):
    """Guided with layers that are larger than tables of ten timesteps."""

    def __init__(self):
        super().__init__()
        self.time, self.guidance = nn.Linear(8, 64), nn.Linear(1, 64)
        self.emb1, self.emb2, self.emb3 = nn.Linear(64, 4), nn.Linear(64, 4), nn.Linear(64, 4)


class Framed(TinyUNet):
    """A timestep for each of three tokens, of which only the mean counts."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep.float().mean(1))


class Pooled(nn.Module):
    """A mean of tokens joins the time embedding, so that what lies behind it is no function of the timestep alone."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32))
        self.text, self.emb = nn.Linear(6, 32), nn.Linear(32, 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample, timestep, tokens):
        emb = self.time(sinusoid(timestep, 8)) + self.text(tokens.mean(1))
        return self.conv2(F.silu(self.conv1(sample) + self.emb(F.silu(emb))[:, :, None, None]))


def noise(rows=2, seed=0):
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def example(network, rows=2):
    more = {
        Wide: {"guidance": torch.arange(rows) + 1.0},
        Labelled: {"class_labels": torch.arange(rows)},
        Pooled: {"tokens": torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(2))},
    }
    return {"sample": noise(rows), "timestep": TIMESTEPS[:rows], **more.get(network, {})}


@functools.cache
def precomputed(network=TinyUNet, dtype=torch.float32, timesteps=TIMESTEPS, labels=0, **settings):
    if labels:
        settings["finite"] = {"class_labels": range(labels)}
    given = {
        n: x.to(dtype) if x.is_floating_point() and n != "timestep" else x
        for n, x in example(network).items()
    }
    return tfmq_fx.precompute(make(network).to(dtype), example=given, timesteps=timesteps, **settings)


def placed(model, place):
    """Return a copy of the model whose block is at another place."""
    found, old = copy.deepcopy(model), model.outside
    settings = {**old.settings(), "place": place}
    found.outside = Outside(old.block, timestep=old.timestep, tables=old.tables, **settings)
    return found


def chosen(model):
    return {f["path"]: f["chosen"] for f in model.report["maintenance"]["features"]}
