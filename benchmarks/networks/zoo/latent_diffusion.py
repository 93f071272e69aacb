"""A network in the manner of latent diffusion (CompVis/latent-diffusion, openaimodel.py), after guided-diffusion."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
    args = timesteps[:, None].float() * freqs.to(device=timesteps.device)[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class TimestepBlock(nn.Module):
    """Any module whose forward takes the time embedding as its second argument."""


class TimestepEmbedSequential(nn.Sequential):
    """A sequential that hands the time embedding to those of its children that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class LDMResBlock(TimestepBlock):
    def __init__(self, channels: int, emb_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        for parameter in out.parameters():
            nn.init.zeros_(parameter)
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, out_channels), nn.SiLU(), nn.Dropout(0.0), out)
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        h = self.out_layers(h + emb_out)
        y: Tensor = self.skip_connection(x) + h
        return y


class LDMAttentionBlock(nn.Module):
    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        ch = c // self.num_heads
        q, k, v = qkv.reshape(b * self.num_heads, ch * 3, -1).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h: Tensor = self.proj_out(torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1))
        return (x + h).reshape(b, c, *spatial)


class LDMDownsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.op(x)
        return y


class LDMUpsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return y


class LDMUNetModel(nn.Module):
    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: tuple[int, ...],
        num_res_blocks: int,
        attention_levels: tuple[int, ...],
        num_head_channels: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        emb = model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(in_channels, model_channels, 3, padding=1))]
        )
        skips, ch = [model_channels], model_channels
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [LDMResBlock(ch, emb, mult * model_channels, groups)]
                ch = mult * model_channels
                if level in attention_levels:
                    layers.append(LDMAttentionBlock(ch, num_head_channels, groups))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level != len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(LDMDownsample(ch)))
                skips.append(ch)

        self.middle_block = TimestepEmbedSequential(
            LDMResBlock(ch, emb, ch, groups),
            LDMAttentionBlock(ch, num_head_channels, groups),
            LDMResBlock(ch, emb, ch, groups),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [LDMResBlock(ch + skips.pop(), emb, mult * model_channels, groups)]
                ch = mult * model_channels
                if level in attention_levels:
                    layers.append(LDMAttentionBlock(ch, num_head_channels, groups))
                if level and i == num_res_blocks:
                    layers.append(LDMUpsample(ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        out = nn.Conv2d(ch, out_channels, 3, padding=1)
        for parameter in out.parameters():
            nn.init.zeros_(parameter)
        self.out = nn.Sequential(nn.GroupNorm(groups, ch), nn.SiLU(), out)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        hs = []
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h = x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        y: Tensor = self.out(h)
        return y
