"""A network with one timestep for the whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ScalarModulation(nn.Module):
    """A convolution scaled and shifted by the embedding, which is a one-pixel image of batch size 1."""

    def __init__(self, channels: int, emb: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Conv2d(emb, 2 * channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(F.silu(emb)).chunk(2, dim=1)
        y: Tensor = x + F.silu(self.conv(self.norm(x) * (1 + scale) + shift))
        return y


class ScalarStepNetwork(nn.Module):
    """Its timestep is a tensor of shape (), its embedding and its projections are convolutions."""

    def __init__(self, *, channels: int, emb: int, depth: int) -> None:
        super().__init__()
        self.emb = emb
        self.embed_in = nn.Linear(emb, 3 * emb)
        self.embed_out = nn.Conv2d(3 * emb, emb, 1)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ScalarModulation(channels, emb) for _ in range(depth))
        self.head = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        k = torch.arange(self.emb // 2, dtype=torch.float32, device=timestep.device)
        angle = timestep.float() * torch.exp(-math.log(10000) * k / (self.emb // 2))
        wave = torch.cat([angle.sin(), angle.cos()]).unsqueeze(0)
        emb = self.embed_out(F.gelu(self.embed_in(wave))[:, :, None, None])
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, emb)
        y: Tensor = self.head(h)
        return y
