"""A network in the manner of the official DDIM repository (ermongroup/ddim)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    assert len(timesteps.shape) == 1
    half_dim = embedding_dim // 2
    scale = math.log(10000) / (half_dim - 1)
    frequencies = torch.exp(torch.arange(half_dim, dtype=torch.float32) * -scale).to(device=timesteps.device)
    emb = timesteps.float()[:, None] * frequencies[None, :]
    return torch.cat([torch.sin(emb), torch.cos(emb)], dim=1)


def nonlinearity(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class DDIMResnetBlock(nn.Module):
    def __init__(self, *, in_channels: int, out_channels: int, temb_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h: Tensor = self.conv1(nonlinearity(self.norm1(x)))
        h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


class DDIMAttnBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        b, c, h, w = x.shape
        q = self.q(h_).reshape(b, c, h * w).permute(0, 2, 1)
        k = self.k(h_).reshape(b, c, h * w)
        v = self.v(h_).reshape(b, c, h * w)
        w_ = F.softmax(torch.bmm(q, k) * (int(c) ** -0.5), dim=2)
        h_ = torch.bmm(v, w_.permute(0, 2, 1)).reshape(b, c, h, w)
        y: Tensor = x + self.proj_out(h_)
        return y


class DDIMDownsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class DDIMUpsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class DDIMModel(nn.Module):
    """`temb.dense` holds the embedding, and bare nn.Modules the blocks of each resolution."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_level: int,
        channels: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.ch, self.num_res_blocks, self.num_resolutions = ch, num_res_blocks, len(ch_mult)
        temb_ch = 4 * ch
        self.temb: Any = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb_ch), nn.Linear(temb_ch, temb_ch)])
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)

        def resnet(c_in: int, c_out: int) -> DDIMResnetBlock:
            return DDIMResnetBlock(in_channels=c_in, out_channels=c_out, temb_channels=temb_ch, groups=groups)

        skips, block_in = [ch], ch
        self.down: Any = nn.ModuleList()
        for i, mult in enumerate(ch_mult):
            level: Any = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                level.block.append(resnet(block_in, ch * mult))
                block_in = ch * mult
                if i == attn_level:
                    level.attn.append(DDIMAttnBlock(block_in, groups))
                skips.append(block_in)
            if i != self.num_resolutions - 1:
                level.downsample = DDIMDownsample(block_in)
                skips.append(block_in)
            self.down.append(level)

        self.mid: Any = nn.Module()
        self.mid.block_1 = resnet(block_in, block_in)
        self.mid.attn_1 = DDIMAttnBlock(block_in, groups)
        self.mid.block_2 = resnet(block_in, block_in)

        self.up: Any = nn.ModuleList()
        for i in reversed(range(self.num_resolutions)):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                level.block.append(resnet(block_in + skips.pop(), ch * ch_mult[i]))
                block_in = ch * ch_mult[i]
                if i == attn_level:
                    level.attn.append(DDIMAttnBlock(block_in, groups))
            if i != 0:
                level.upsample = DDIMUpsample(block_in)
            self.up.insert(0, level)

        self.norm_out = nn.GroupNorm(groups, block_in, eps=1e-6)
        self.conv_out = nn.Conv2d(block_in, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = get_timestep_embedding(t, self.ch)
        temb = self.temb.dense[0](temb)
        temb = nonlinearity(temb)
        temb = self.temb.dense[1](temb)

        hs = [self.conv_in(x)]
        for i in range(self.num_resolutions):
            for j in range(self.num_res_blocks):
                h = self.down[i].block[j](hs[-1], temb)
                if len(self.down[i].attn) > 0:
                    h = self.down[i].attn[j](h)
                hs.append(h)
            if i != self.num_resolutions - 1:
                hs.append(self.down[i].downsample(hs[-1]))

        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)

        for i in reversed(range(self.num_resolutions)):
            for j in range(self.num_res_blocks + 1):
                h = self.up[i].block[j](torch.cat([h, hs.pop()], dim=1), temb)
                if len(self.up[i].attn) > 0:
                    h = self.up[i].attn[j](h)
            if i != 0:
                h = self.up[i].upsample(h)

        y: Tensor = self.conv_out(nonlinearity(self.norm_out(h)))

        return y
