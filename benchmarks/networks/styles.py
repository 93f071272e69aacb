"""Networks as other codebases than diffusers write them, small and in our own words, with the truth of their temporal blocks.

Each module here stands for a way of writing a denoiser: who gives the timestep, what joins it, how it meets the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks.small import sinusoid
from benchmarks.networks.zoo.entry import Entry, builder

STEPS = torch.arange(50, 1000, 100)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(most: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))


# guided-diffusion: the label is an embedding added to the time's, and scale and shift follow the norm.


class ScaleShiftBlock(nn.Module):
    def __init__(self, channels: int, out: int, emb: int, *, resize: str = "") -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(4, out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def resized(self, x: Tensor) -> Tensor:
        if self.resize == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resize == "down" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        rest, last = self.in_layers[:-1], self.in_layers[-1]
        h = last(self.resized(rest(x)))
        scale, shift = self.emb_layers(emb).type(h.dtype)[..., None, None].chunk(2, dim=1)
        norm, after = self.out_layers[0], self.out_layers[1:]
        y: Tensor = self.skip(self.resized(x)) + after(norm(h) * (1 + scale) + shift)
        return y


class ChannelAttention(nn.Module):
    """Queries, keys and values from a convolution over positions, scaled on both sides before their product."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(4, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(x)).reshape(b * self.heads, 3 * c // self.heads, -1).chunk(3, dim=1)
        scale = (c // self.heads) ** -0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        y: Tensor = (x + self.proj_out(h)).reshape(b, c, *spatial)
        return y


class ClassUNet(nn.Module):
    def __init__(self, channels: int = 8, classes: int = 6) -> None:
        super().__init__()
        emb = 4 * channels
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb)
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down = ScaleShiftBlock(channels, channels, emb, resize="down")
        self.middle = nn.ModuleList([ScaleShiftBlock(channels, channels, emb), ChannelAttention(channels)])
        self.up = ScaleShiftBlock(channels, channels, emb, resize="up")
        self.last = ScaleShiftBlock(2 * channels, channels, emb)
        self.out = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 6, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(sinusoid(timesteps, self.channels))
        if y is not None:
            assert y.shape == (x.shape[0],)
            emb = emb + self.label_emb(y)
        skip = self.first(x)
        h = self.middle[0](self.down(skip, emb), emb)
        h = self.up(self.middle[1](h), emb)
        found: Tensor = self.out(self.last(torch.cat([h, skip], dim=1), emb))
        return found


# k-diffusion: a wrapper scales the data by functions of sigma; the network inside sees log(sigma) / 4.


class FourierFeatures(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(size // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        f = 2 * math.pi * x @ self.weight.T  # type: ignore[operator]
        return torch.cat([f.cos(), f.sin()], dim=-1)


class AdaptiveNorm(nn.Module):
    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(condition, 2 * channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        weight, bias = self.mapper(condition).chunk(2, dim=-1)
        x = F.group_norm(x, 4, eps=1e-5)
        return torch.addcmul(bias[..., None, None], x, weight[..., None, None] + 1)


class Mapped(nn.Module):
    """A mapping network with a residual, and two blocks that it conditions."""

    def __init__(self, channels: int = 8, width: int = 16) -> None:
        super().__init__()
        self.timestep_embed = FourierFeatures(width)
        self.mapping = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.proj_in, self.proj_out = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 3, 1)
        self.norms = nn.ModuleList(AdaptiveNorm(channels, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, input: Tensor, sigma: Tensor) -> Tensor:
        emb = self.timestep_embed((sigma.log() / 4)[..., None])
        emb = self.mapping(emb) + emb
        x = self.proj_in(input)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.gelu(norm(x, emb)))
        y: Tensor = self.proj_out(x)
        return y


def append_dims(x: Tensor, dims: int) -> Tensor:
    return x[(...,) + (None,) * (dims - x.ndim)]


class Preconditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner_model, self.sigma_data = Mapped(), 0.5

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        total = sigma**2 + self.sigma_data**2
        scales = self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5, 1 / total**0.5
        c_skip, c_out, c_in = (append_dims(x, input.ndim) for x in scales)
        y: Tensor = self.inner_model(input * c_in, sigma, **kwargs) * c_out + input * c_skip
        return y


# EDM2: weights are normalised at each call and multiplied by learned gains; sums and activations keep magnitudes.


def unit(x: Tensor, dim: list[int] | None = None, eps: float = 1e-4) -> Tensor:
    dim = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    norm = torch.add(eps, norm, alpha=math.sqrt(norm.numel() / x.numel()))
    return x / norm.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


class MagnitudeLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = unit(self.weight.to(torch.float32))
        w = (w * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MagnitudeBlock(nn.Module):
    def __init__(self, channels: int, emb: int, *, attention: bool = False) -> None:
        super().__init__()
        self.emb_gain = nn.Parameter(torch.tensor(0.5))
        self.conv_res0 = MagnitudeLayer(channels, 2 * channels, (3, 3))
        self.emb_linear = MagnitudeLayer(emb, 2 * channels)
        self.conv_res1 = MagnitudeLayer(2 * channels, channels, (3, 3))
        self.attn_qkv = MagnitudeLayer(channels, 3 * channels, (1, 1)) if attention else None
        self.attn_proj = MagnitudeLayer(channels, channels, (1, 1)) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = unit(x, dim=[1])
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = self.conv_res1(mp_silu(y * c.unsqueeze(2).unsqueeze(3).to(y.dtype)))
        x = mp_sum(x, y, 0.3)
        if self.attn_qkv is not None and self.attn_proj is not None:
            y = self.attn_qkv(x).reshape(x.shape[0], 1, -1, 3, x.shape[2] * x.shape[3])
            q, k, v = unit(y, dim=[2]).unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
            y = torch.einsum("nhqk,nhck->nhcq", w, v)
            x = mp_sum(x, self.attn_proj(y.reshape(*x.shape)), 0.3)
        return x.clip(-256, 256)


class MagnitudePreserving(nn.Module):
    def __init__(self, channels: int = 8, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.classes, self.sigma_data = classes, 0.5
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))
        self.emb_noise, self.emb_label = MagnitudeLayer(width, width), MagnitudeLayer(classes, width)
        self.enc = MagnitudeLayer(4, channels, (3, 3))
        self.blocks = nn.ModuleList(MagnitudeBlock(channels, width, attention=i == 1) for i in range(2))
        self.out_conv, self.out_gain = MagnitudeLayer(channels, 3, (3, 3)), nn.Parameter(torch.tensor(0.7))

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False
    ) -> Tensor:
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        assert class_labels is not None
        labels = class_labels.to(torch.float32).reshape(-1, self.classes)
        dtype = torch.float32 if force_fp32 or x.device.type != "cuda" else torch.float16
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + sigma**2).sqrt()
        y = self.inner((c_in * x).to(dtype), sigma.flatten().log() / 4, labels)
        return c_skip * x + c_out * y.to(torch.float32)

    def inner(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        waves = (c_noise.ger(self.freqs) + self.phases).cos() * math.sqrt(2)  # type: ignore[arg-type, operator]
        emb = self.emb_noise(waves.to(c_noise.dtype))
        emb = mp_silu(mp_sum(emb, self.emb_label(labels * math.sqrt(labels.shape[1]))))
        x = self.enc(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        for block in self.blocks:
            x = block(x, emb)
        y: Tensor = self.out_conv(x, gain=self.out_gain)
        return y


# Video transformers: attention over space and over time in turn, one modulation for all blocks plus each block's table,
# and given frames, whose modulation is that of timestep 0.


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-2, -3).flatten(-2)


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y: Tensor = self.proj(attend(q, k, v, heads=2))
        return y


class VideoBlock(nn.Module):
    def __init__(self, width: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal, self.width = temporal, width
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(width)
        self.q, self.kv, self.proj = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )

    def modulated(
        self, frames: int, x: Tensor, t: Tensor, t0: Tensor, given: Tensor, rows: tuple[int, int]
    ) -> Tensor:
        """Scale and shift each frame by its own timestep."""
        scale, shift, scale_0, shift_0 = (s[:, row] for s in (t, t0) for row in rows)
        x = F.layer_norm(x, (self.width,))
        a = x * (1 + scale[:, None]) + shift[:, None]
        b = x * (1 + scale_0[:, None]) + shift_0[:, None]
        a, b = (y.unflatten(1, (frames, -1)) for y in (a, b))
        return torch.where(given[:, :, None, None], a, b).flatten(1, 2)

    def forward(
        self, x: Tensor, y: Tensor, mask: Tensor, t: Tensor, t0: Tensor, given: Tensor, frames: int
    ) -> Tensor:
        t, t0 = (self.scale_shift_table[None] + s.reshape(-1, 6, self.width) for s in (t, t0))
        b = x.shape[0]
        h = self.modulated(frames, x, t, t0, given, (0, 1)).unflatten(1, (frames, -1))
        h = h.transpose(1, 2) if self.temporal else h
        h = self.attn(h.flatten(0, 1)).unflatten(0, (b, -1))
        h = (h.transpose(1, 2) if self.temporal else h).flatten(1, 2)
        x = x + h * t[:, 2:3]
        k, v = self.kv(y).chunk(2, -1)
        x = x + self.proj(attend(self.q(x), k, v, heads=2, mask=mask[:, None, None]))
        z: Tensor = x + self.mlp(self.modulated(frames, x, t, t0, given, (3, 4))) * t[:, 5:6]
        return z


class Embedder(nn.Module):
    def __init__(self, width: int, size: int = 8) -> None:
        super().__init__()
        self.size, self.mlp = (
            size,
            nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width)),
        )

    def forward(self, t: Tensor) -> Tensor:
        y: Tensor = self.mlp(sinusoid(t, self.size))
        return y


class VideoTransformer(nn.Module):
    def __init__(self, width: int = 16, patch: tuple[int, int, int] = (1, 2, 2)) -> None:
        super().__init__()
        self.patch = patch
        self.x_embedder = nn.Conv3d(2, width, patch, stride=patch)
        self.t_embedder, self.fps_embedder = Embedder(width), Embedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(VideoBlock(width, temporal=i % 2 == 1) for i in range(2))
        self.final_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final = nn.Linear(width, 2 * math.prod(patch))

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor, x_mask: Tensor, fps: Tensor
    ) -> Tensor:
        _, _, frames, height, width = x.shape
        fps_emb = self.fps_embedder(fps)
        t = self.t_embedder(timestep) + fps_emb
        t0 = self.t_embedder(torch.zeros_like(timestep)) + fps_emb
        y = self.y_embedder(y)
        h = self.x_embedder(x).flatten(2).transpose(1, 2)
        rows, rows_0 = self.t_block(t), self.t_block(t0)
        for block in self.blocks:
            h = block(h, y, mask, rows, rows_0, x_mask, frames)
        shift, scale = (self.final_table[None] + t[:, None]).chunk(2, dim=1)
        h = self.final(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        p, q = height // self.patch[1], width // self.patch[2]
        h = h.reshape(-1, frames, p, q, *self.patch[1:], 2)
        z: Tensor = h.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, 2, frames, height, width)
        return z


# A policy of a robot: a UNet over a sequence of actions, whose FiLM layers see the step beside what was observed.


class FiLMBlock(nn.Module):
    def __init__(self, channels: int, out: int, condition: int) -> None:
        super().__init__()
        self.out = out
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(i, out, 5, padding=2), nn.GroupNorm(4, out), nn.Mish())
            for i in (channels, out)
        )
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * out), nn.Unflatten(-1, (-1, 1)))
        self.residual_conv = nn.Conv1d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.blocks[0](x)
        film = self.cond_encoder(condition).reshape(condition.shape[0], 2, self.out, 1)
        h = self.blocks[1](film[:, 0] * h + film[:, 1])
        y: Tensor = h + self.residual_conv(x)
        return y


class Policy(nn.Module):
    def __init__(self, actions: int = 3, observed: int = 10, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.step_encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        condition = width + observed
        self.down = FiLMBlock(actions, width, condition)
        self.downsample = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.mid = FiLMBlock(width, 2 * width, condition)
        self.upsample = nn.ConvTranspose1d(2 * width, width, 4, stride=2, padding=1)
        self.up = FiLMBlock(2 * width, width, condition)
        self.final_conv = nn.Conv1d(width, actions, 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        assert local_cond is None
        assert global_cond is not None
        x = sample.moveaxis(-1, -2)
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        elif timestep.dim() == 0:
            timestep = timestep[None].to(sample.device)
        timestep = timestep.expand(sample.shape[0])
        condition = torch.cat([self.step_encoder(sinusoid(timestep, self.width)), global_cond], dim=-1)
        skip = self.down(x, condition)
        h = self.upsample(self.mid(self.downsample(skip), condition))
        y: Tensor = self.final_conv(self.up(torch.cat([h, skip], dim=1), condition))
        return y.moveaxis(-1, -2)


# A row of a table: the same shape as conditioning would have.


class Tabular(nn.Module):
    def __init__(self, columns: int = 7, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = nn.Embedding(classes, width)
        self.proj = nn.Linear(columns, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, columns)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        emb = self.time_embed(sinusoid(timesteps, self.width)) + F.silu(self.label_emb(y))
        x = self.proj(x) + emb
        for layer in self.layers:
            x = F.relu(layer(x))
        z: Tensor = self.head(x)
        return z


# Molecules: messages along edges, gathered and added up at their targets; padding by masks.


class Messages(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU(), nn.Linear(width, width))
        self.node = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.coordinate, self.time = nn.Linear(width, 1), nn.Linear(width, width)

    def forward(self, h: Tensor, x: Tensor, edges: Tensor, real: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """h (nodes, width), x (nodes, 3), edges (2, E), real (E, 1): 0 for padding; t (nodes, width)."""
        source, target = edges
        difference = x[source] - x[target]
        distance = difference.square().sum(1, keepdim=True)
        message = self.edge(torch.cat([h[source], h[target], distance], dim=1)) * real
        total = torch.zeros_like(h).index_add(0, target, message)
        moved = torch.zeros_like(x).index_add(0, target, difference * self.coordinate(message).tanh() * real)
        h = h + self.node(torch.cat([h, total], dim=1)) + self.time(F.silu(t))
        return h, x + moved / (distance.mean() + 1)


class Molecule(nn.Module):
    """A batch of graphs is one graph of all their atoms; each has its own edges."""

    def __init__(self, features: int = 5, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.embed, self.head = nn.Linear(features, width), nn.Linear(width, features)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(Messages(width) for _ in range(2))

    def forward(
        self, h: Tensor, pos: Tensor, t: Tensor, edge_index: Tensor, edge_mask: Tensor, node_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        graphs, atoms, _ = h.shape
        first = torch.arange(graphs, device=h.device) * atoms
        edges = (edge_index + first[:, None, None]).permute(1, 0, 2).reshape(2, -1)
        real = edge_mask.reshape(-1, 1).to(h.dtype)
        of = torch.arange(graphs, device=h.device).repeat_interleave(atoms)
        time = self.time(sinusoid(t, self.width))[of]
        features, x = self.embed(h).flatten(0, 1), pos.flatten(0, 1)
        for layer in self.layers:
            features, x = layer(features, x, edges, real, time)
        kept = node_mask[..., None].to(h.dtype)
        return self.head(features).unflatten(0, (graphs, atoms)) * kept, (
            x.unflatten(0, (graphs, atoms)) - pos
        ) * kept


# Speech by flow matching: sequences of several lengths in one batch, padding hidden by boolean masks everywhere.


class SpeechBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(F.silu(t))[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        h = attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=2, mask=mask[:, None, None, :])
        x = x + gate * self.to_out(h).masked_fill(~mask[..., None], 0.0)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_2) + shift_2
        y: Tensor = x + gate_2 * self.ff(h)
        return y


class Speech(nn.Module):
    def __init__(self, mel: int = 6, width: int = 16, letters: int = 12) -> None:
        super().__init__()
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.text_embed = nn.Embedding(letters + 1, width)  # 0 fills up
        self.proj = nn.Linear(2 * mel + width, width)
        self.position = nn.Sequential(nn.Conv1d(width, width, 5, padding=2, groups=4), nn.Mish())
        self.blocks = nn.ModuleList(SpeechBlock(width) for _ in range(2))
        self.norm_out, self.proj_out = nn.Linear(width, 2 * width), nn.Linear(width, mel)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        text: Tensor,
        time: Tensor,
        mask: Tensor,
        drop_audio_cond: bool = False,
        drop_text: bool = False,
    ) -> Tensor:
        if time.ndim == 0:
            time = time.repeat(x.shape[0])
        t = self.time_embed(sinusoid(1000 * time, self.width))
        text = text + 1  # -1 is padding
        text = torch.zeros_like(text) if drop_text else text
        cond = torch.zeros_like(cond) if drop_audio_cond else cond
        words = self.text_embed(text).masked_fill((text == 0)[..., None], 0.0)
        h = self.proj(torch.cat([x, cond, words], dim=-1)).masked_fill(~mask[..., None], 0.0)
        h = self.position(h.transpose(1, 2)).transpose(1, 2) * mask[..., None] + h
        for block in self.blocks:
            h = block(h, t, mask)
        scale, shift = self.norm_out(F.silu(t)).chunk(2, dim=-1)
        y: Tensor = self.proj_out(F.layer_norm(h, h.shape[-1:]) * (1 + scale)[:, None] + shift[:, None])
        return y.masked_fill(~mask[..., None], 0.0)


def molecules(rows: int) -> dict[str, Tensor]:
    sizes = torch.arange(rows) % 3 + 4  # 4 to 6 atoms
    return {
        "h": normal(rows, 6, 5),
        "pos": normal(rows, 6, 3, seed=1),
        "edge_index": integers(4, rows, 2, 10),
        "edge_mask": torch.arange(10)[None] < (2 * sizes - 2)[:, None],
        "node_mask": torch.arange(6)[None] < sizes[:, None],
    }


def speech(rows: int) -> dict[str, Tensor]:
    lengths = torch.arange(rows) % 5 + 6  # 6 to 10 frames
    mask = torch.arange(10)[None] < lengths[:, None]
    return {
        "x": normal(rows, 10, 6) * mask[..., None],
        "cond": normal(rows, 10, 6, seed=1) * (torch.arange(10) < 3)[:, None],
        "text": torch.where(torch.arange(10)[None] < lengths[:, None] // 2, integers(12, rows, 10), -1),
        "mask": mask,
    }


@dataclass(frozen=True, kw_only=True)
class Style:
    """A style: the truth about its network's block, and the rows that it receives while sampling."""

    entry: Entry
    rows: Callable[[int], Mapping[str, Tensor]]  # inputs but the timestep, (N, ...) each
    steps: Tensor

    def inputs(self, rows: int) -> dict[str, Tensor]:
        """Return forward's arguments, (rows, ...) each, with the schedule's timesteps in turn."""
        return {
            **self.rows(rows),
            self.entry.timestep: self.steps.repeat(-(-rows // len(self.steps)))[:rows],
        }


def style(
    name: str,
    network: Callable[..., nn.Module],
    rows: Callable[[int], Mapping[str, Tensor]],
    steps: Tensor,
    **truth: Any,
) -> Style:
    def inputs(_: bool) -> dict[str, Any]:
        return made.inputs(3)

    truth = {
        "pure_features": truth["features"],
        "pure_layers": truth["layers"],
        **truth,
        "keys": (truth["timestep"], *truth.get("keys", ())),
    }
    made = Style(
        entry=Entry(name=name, build=builder(network, {}, {}), inputs=inputs, **truth), rows=rows, steps=steps
    )
    return made


def mlp(name: str, *places: int) -> tuple[str, ...]:
    return tuple(f"{name}.{i}" for i in places)


_GUIDED = ("down.emb_layers.1", "middle.0.emb_layers.1", "up.emb_layers.1", "last.emb_layers.1")
_GAINS = ("blocks.0.emb_linear", "blocks.1.emb_linear")
_FILM = tuple(f"{b}.cond_encoder.1" for b in ("down", "mid", "up"))
_SPEECH = ("blocks.0.modulation", "blocks.1.modulation", "norm_out")
_SIGMAS = torch.logspace(-1.5, 1.5, 10)

STYLES = (
    style(
        "guided-diffusion",
        ClassUNet,
        lambda n: {"x": normal(n, 3, 8, 8), "y": integers(6, n)},
        STEPS,
        timestep="timesteps",
        features=_GUIDED,
        layers=(*mlp("time_embed", 0, 2), *_GUIDED),
        keys=("y",),
        pure_features=("time_embed.2",),
        pure_layers=mlp("time_embed", 0, 2),
    ),
    style(
        "k-diffusion",
        Preconditioned,
        lambda n: {"input": normal(n, 3, 6, 6)},
        _SIGMAS,
        timestep="sigma",
        features=("inner_model.norms.0.mapper", "inner_model.norms.1.mapper"),
        layers=(
            *mlp("inner_model.mapping", 0, 2),
            "inner_model.norms.0.mapper",
            "inner_model.norms.1.mapper",
        ),
    ),
    style(
        "edm2",
        MagnitudePreserving,
        lambda n: {"x": normal(n, 3, 6, 6), "class_labels": F.one_hot(integers(5, n), 5).float()},
        _SIGMAS,
        timestep="sigma",
        features=_GAINS,
        layers=("emb_noise", "emb_label", *_GAINS),
        keys=("class_labels",),
        pure_features=("emb_noise",),
        pure_layers=("emb_noise",),
    ),
    style(
        "video-transformer",
        VideoTransformer,
        lambda n: {
            "x": normal(n, 2, 3, 4, 4),
            "y": normal(n, 5, 6),
            "mask": torch.arange(5)[None] < 2 + torch.arange(n)[:, None] % 4,
            "x_mask": torch.arange(3)[None] >= torch.arange(n)[:, None] % 2,
            "fps": torch.tensor([8.0, 24.0]).repeat(n)[:n],
        },
        STEPS,
        timestep="timestep",
        features=("t_block.1", "t_embedder.mlp.2"),
        layers=(*mlp("t_embedder.mlp", 0, 2), *mlp("fps_embedder.mlp", 0, 2), "t_block.1"),
        keys=("fps",),
        pure_features=("t_embedder.mlp.2",),
        pure_layers=mlp("t_embedder.mlp", 0, 2),
    ),
    style(
        "diffusion-policy",
        Policy,
        lambda n: {"sample": normal(n, 8, 3), "global_cond": normal(n, 10, seed=1)},
        STEPS,
        timestep="timestep",
        features=_FILM,
        layers=(*mlp("step_encoder", 0, 2), *_FILM),
        keys=("global_cond",),
        pure_features=("step_encoder.2",),
        pure_layers=mlp("step_encoder", 0, 2),
    ),
    style(
        "tabular",
        Tabular,
        lambda n: {"x": normal(n, 7), "y": integers(3, n)},
        STEPS,
        timestep="timesteps",
        features=("time_embed.2",),
        layers=mlp("time_embed", 0, 2),
    ),
    style(
        "molecule",
        Molecule,
        molecules,
        STEPS,
        timestep="t",
        features=("layers.0.time", "layers.1.time"),
        layers=(*mlp("time", 0, 2), "layers.0.time", "layers.1.time"),
    ),
    style(
        "speech",
        Speech,
        speech,
        torch.linspace(0, 0.9, 10),
        timestep="time",
        features=_SPEECH,
        layers=(*mlp("time_embed", 0, 2), *_SPEECH),
    ),
)
