"""Small networks in plain torch, so that nothing in the tests leans on a diffusers class."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tfmq_fx


def sinusoid(t: Tensor, dim: int) -> Tensor:
    frequency = torch.exp(torch.arange(dim // 2, dtype=torch.float32) * (-math.log(10000.0) / (dim // 2)))
    angle = t.float().reshape(-1, 1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, channels), nn.GroupNorm(2, out)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.emb = nn.Linear(emb, out)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        y: Tensor = self.skip(x) + h
        return y


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        y = self.out(F.scaled_dot_product_attention(q, k, v))
        z: Tensor = x + y.transpose(1, 2).reshape(b, c, h, w)
        return z


class TinyUNet(nn.Module):
    """A U-shaped denoiser of 8x8 images: two residual blocks, attention, a skip, down- and up-sampling."""

    def __init__(self, channels: int = 8, emb: int = 16) -> None:
        super().__init__()
        self.emb_dim = emb
        self.time_mlp = nn.Sequential(nn.Linear(emb, 2 * emb), nn.SiLU(), nn.Linear(2 * emb, 2 * emb))
        self.conv_in = nn.Conv2d(1, channels, 3, padding=1)
        self.down_block = ResBlock(channels, channels, 2 * emb)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.attention = Attention(channels)
        self.up_block = ResBlock(2 * channels, channels, 2 * emb)
        self.conv_out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        emb = self.time_mlp(sinusoid(timestep, self.emb_dim))
        h = self.conv_in(sample)
        skip = self.down_block(h, emb)
        h = self.attention(self.down(skip))
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        y: Tensor = self.conv_out(self.up_block(torch.cat([h, skip], dim=1), emb))
        return y


class ScalarTime(nn.Module):
    """A plain module that takes one timestep of shape () for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift = self.time(sinusoid(timestep, 8))
        y: Tensor = self.head(F.gelu(self.body(sample) + shift))
        return y


def make(cls: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().eval()


TIMESTEPS = torch.arange(0, 1000, 100).flip(0)


def calibration(rows: int = 40, seed: int = 0) -> tfmq_fx.CalibrationSet:
    """Noise at every timestep of TIMESTEPS, a few rows each."""
    generator = torch.Generator().manual_seed(seed)
    return tfmq_fx.CalibrationSet.from_tensors(
        {
            "sample": torch.randn(rows, 1, 8, 8, generator=generator),
            "timestep": TIMESTEPS.repeat(-(-rows // 10))[:rows],
        }
    )


FAST = tfmq_fx.Reconstruction(
    iterations=20, temporal_iterations=100, num_samples=40, batch_size=20, tune_iterations=0
)


def prepared(bits: str = "w4a8", **changes: object) -> torch.fx.GraphModule:
    """A calibrated graph of the tiny network."""
    recipe = dataclasses.replace(tfmq_fx.Recipe.preset(bits), reconstruction=FAST, **changes)  # type: ignore[arg-type]
    gm = captured()
    return tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), calibration())


def captured(cls: Any = TinyUNet) -> torch.fx.GraphModule:
    """A graph of the caller's own."""
    return copy.deepcopy(_captured(cls))


@functools.cache
def _captured(cls: type[nn.Module]) -> torch.fx.GraphModule:
    example = {n: x[:2] for n, x in calibration().tensors.items()}
    return tfmq_fx.capture(make(cls), example)
