"""Build small random denoisers in plain torch: U-shaped and token networks, each described by a `Spec`.

The modules' names tell which layers are in the temporal block. A layer called `project` returns a temporal
feature. Other layers whose name starts with `time` or `vector` precede one. No other layer belongs to the
block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import tfmq_fx

ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu, "gelu": F.gelu, "tanh-gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
    "mish": F.mish, "tanh": torch.tanh, "leaky": F.leaky_relu, "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
}  # fmt: skip
SMOOTH = ("silu", "gelu", "tanh-gelu", "mish", "quick-gelu")
SIZE, TOKENS, CONTEXT = 8, 6, 5  # pixels per side, tokens per sequence, tokens per context
LABELS = 7


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The description of one network. Invariant: `channels` and `emb` are multiples of 4."""

    body: str = "unet"  # "unet", or "tokens" for a transformer
    seed: int = 0  # of the parameters
    depth: int = 1  # levels of the U, layers of the transformer
    channels: int = 4
    emb: int = 8
    dims: int = 2  # of the sample: 1 or 2 (unet); tokens (N, L, C) or patches of a picture (tokens)
    norm: str = "group"  # "group", "batch", "instance", "layer", "rms", "none"
    activation: str = "silu"  # of the body
    time_activation: str = "silu"
    time_layers: int = 2  # linear layers before the projections
    embedding: str = "sinusoidal"  # "sinusoidal", "fourier" (of a float timestep), "learned"
    scalar: bool = False  # one timestep per call, of shape ()
    inject: str = "add"  # "add", "scale-shift", "gate"; "shared": one projection for all blocks; "token": an extra token
    convolution: str = "plain"  # "plain", "grouped", "depthwise", "pointwise"
    down: str = "stride"  # "stride", "pool"
    up: str = "nearest"  # "nearest", "transpose"
    skip: str = "cat"  # "cat", "add"
    attention: str = "none"  # "none", "fused", "matmul"
    glu: bool = False  # the transformer's MLP has a gate
    context: bool = False  # cross-attention to a sequence
    conditioning: str = (
        "none"  # "none", "label", "vector", "nested" (a vector in a dict), "cat" (beside the embedding)
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    body = draw(st.sampled_from(["unet", "tokens"]))
    unet = body == "unet"
    embedding = draw(st.sampled_from(["sinusoidal", "fourier", "learned"]))
    injects = ["add", "scale-shift", "gate", "shared"] + ([] if unet else ["token"])
    return Spec(
        body=body,
        seed=draw(st.integers(0, 99)),
        depth=draw(st.integers(1, 2)),
        channels=draw(st.sampled_from([4, 8, 12])),
        emb=draw(st.sampled_from([8, 12])),
        dims=draw(st.sampled_from([1, 2])),
        norm=draw(st.sampled_from(["group", "batch", "instance", "layer", "rms", "none"] if unet else ["layer", "rms"])),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        time_activation=draw(st.sampled_from(SMOOTH)),  # a dead relu would hide a dependence from the test's oracle
        time_layers=draw(st.integers(1, 3)),
        embedding=embedding,
        scalar=draw(st.booleans()),
        inject=draw(st.sampled_from(injects)),
        convolution=draw(st.sampled_from(["plain", "grouped", "depthwise", "pointwise"])),
        down=draw(st.sampled_from(["stride", "pool"])),
        up=draw(st.sampled_from(["nearest", "transpose"])),
        skip=draw(st.sampled_from(["cat", "add"])),
        attention=draw(st.sampled_from(["none", "fused", "matmul"] if unet else ["fused", "matmul"])),
        glu=draw(st.booleans()),
        context=draw(st.booleans()),
        conditioning=draw(st.sampled_from(["none", "label", "vector", "nested", "cat"])),
    )  # fmt: skip


class Norm(nn.Module):
    """A normalization over channels: dimension 1 of (N, C, ...) with `dims` more, or the last if dims is 0."""

    def __init__(self, kind: str, channels: int, dims: int) -> None:
        super().__init__()
        self.last = kind in ("layer", "rms") and dims > 0
        makers: dict[str, Any] = {
            "group": lambda: nn.GroupNorm(2, channels),
            "batch": lambda: (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1](channels),
            "instance": lambda: (nn.InstanceNorm1d, nn.InstanceNorm2d)[dims - 1](channels, affine=True),
            "layer": lambda: nn.LayerNorm(channels),
            "rms": lambda: nn.RMSNorm(channels),
            "none": nn.Identity,
        }
        self.norm = makers[kind]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1) if self.last else self.norm(x)
        return y


class Attention(nn.Module):
    def __init__(self, channels: int, context: int, fused: bool, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(context, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q(x), *self.kv(context).chunk(2, dim=-1))
        )
        if self.fused:
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            h = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v
        y: Tensor = self.out(h.transpose(1, 2).flatten(2))
        return y


class Inject(nn.Module):
    """A layer that injects features of the embedding into (N, C, ...) or, with last=True, into (N, L, C)."""

    def __init__(self, kind: str, emb: int, channels: int, *, dims: int, last: bool = False) -> None:
        super().__init__()
        self.kind, self.last, self.dims = kind, last, dims
        self.parts = {"add": 1, "scale-shift": 2, "gate": 1, "shared": 1, "token": 0}[kind]
        if kind == "shared":  # the block adds its own table to the shared projection
            self.table = nn.Parameter(torch.randn(channels) / 2)
        elif self.parts:
            self.project = nn.Linear(emb, self.parts * channels)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        if not self.parts:
            return h
        value = emb + self.table if self.kind == "shared" else self.project(emb)
        value = value[:, None] if self.last else value.reshape(*value.shape, *[1] * self.dims)
        if self.kind == "scale-shift":
            scale, shift = value.chunk(2, dim=-1 if self.last else 1)
            return h * (1 + scale) + shift
        return h * torch.sigmoid(value) if self.kind == "gate" else h + value


class Time(nn.Module):
    """A network from the timestep (and conditioning) to the embedding (N or 1, E).

    With the injection "shared", it returns the projection (.., channels) for all blocks instead.
    """

    frequency: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, e = spec, spec.emb
        if spec.embedding == "learned":
            self.table = nn.Embedding(1000, e)
        elif spec.embedding == "fourier":
            self.register_buffer("frequency", torch.randn(e // 2))
        else:
            k = torch.arange(e // 2, dtype=torch.float32)
            self.register_buffer("frequency", torch.exp(-math.log(1000) * k / (e // 2)))
        widths = [e, *[2 * e] * (spec.time_layers - 1), e]
        if spec.conditioning == "cat":
            widths[0] += 3
        self.time_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        if spec.conditioning == "label":
            self.label = nn.Embedding(LABELS, e)
        elif spec.conditioning in ("vector", "nested"):
            self.vector_in = nn.Linear(3, e)
        if spec.inject in ("shared", "token"):
            self.project = nn.Linear(e, spec.channels)

    def embedded(self, t: Tensor) -> Tensor:
        if self.spec.embedding == "learned":
            return self.table.weight[t].reshape(1, -1) if self.spec.scalar else self.table(t)
        angle = t.float() * self.frequency if self.spec.scalar else t.float()[:, None] * self.frequency
        y = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return y[None] if self.spec.scalar else y

    def forward(self, t: Tensor, condition: Tensor | None) -> Tensor:
        spec, act = self.spec, ACTIVATIONS[self.spec.time_activation]
        emb = self.embedded(t)
        if spec.conditioning == "cat":
            assert condition is not None
            emb = torch.cat([emb.expand(condition.shape[0], -1), condition.to(emb.dtype)], dim=1)
        for i, layer in enumerate(self.time_layers):
            emb = layer(act(emb) if i else emb)
        if spec.conditioning == "label":
            emb = emb + self.label(condition)
        elif spec.conditioning in ("vector", "nested"):
            emb = emb + self.vector_in(condition)
        emb = act(emb)
        return self.project(emb) if spec.inject in ("shared", "token") else emb  # type: ignore[no-any-return]


def convolution(spec: Spec, a: int, b: int) -> nn.Module:
    cls = (nn.Conv1d, nn.Conv2d)[spec.dims - 1]
    if spec.convolution == "depthwise":
        return nn.Sequential(cls(a, a, 3, padding=1, groups=a), cls(a, b, 1))
    if spec.convolution == "pointwise":
        return cls(a, b, 1)
    return cls(a, b, 3, padding=1, groups=2 if spec.convolution == "grouped" else 1)


class Block(nn.Module):
    def __init__(self, spec: Spec, a: int, b: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.activation]
        self.norm1, self.norm2 = Norm(spec.norm, a, spec.dims), Norm(spec.norm, b, spec.dims)
        self.conv1, self.conv2 = convolution(spec, a, b), convolution(spec, b, b)
        self.inject = Inject(spec.inject, spec.emb, b, dims=spec.dims)
        self.skip = (nn.Conv1d, nn.Conv2d)[spec.dims - 1](a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.inject(self.conv1(self.act(self.norm1(x))), emb)
        y: Tensor = self.skip(x) + self.conv2(self.act(self.norm2(h)))
        return y


class Network(nn.Module):
    """The base of every random network. `timestep` has shape (N,), or () if the spec is scalar."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.time = spec, Time(spec)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        condition: Tensor | None = None,
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        emb = self.time(timestep, condition if added is None else added["condition"])
        return self.body(sample, emb, context)

    def body(self, sample: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError


class UNet(Network):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        c, conv = spec.channels, (nn.Conv1d, nn.Conv2d)[spec.dims - 1]
        transpose = (nn.ConvTranspose1d, nn.ConvTranspose2d)[spec.dims - 1]
        pool = (nn.AvgPool1d, nn.AvgPool2d)[spec.dims - 1]
        self.conv_in, self.conv_out = conv(3, c, 3, padding=1), conv(c, 3, 3, padding=1)
        self.downs = nn.ModuleList(Block(spec, c, c) for _ in range(spec.depth))
        self.ups = nn.ModuleList(Block(spec, c * (1 + (spec.skip == "cat")), c) for _ in range(spec.depth))
        self.shrink = nn.ModuleList(
            conv(c, c, 3, stride=2, padding=1)
            if spec.down == "stride"
            else nn.Sequential(pool(2), conv(c, c, 1))
            for _ in range(spec.depth)
        )
        self.grow = nn.ModuleList(
            transpose(c, c, 2, stride=2)
            if spec.up == "transpose"
            else nn.Sequential(nn.Upsample(scale_factor=2), conv(c, c, 3, padding=1))
            for _ in range(spec.depth)
        )
        wide = 6 if spec.context else c
        self.mid = (
            Attention(c, wide, spec.attention == "fused") if spec.attention != "none" else Block(spec, c, c)
        )

    def body(self, sample: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        h, skips = self.conv_in(sample), []
        for block, shrink in zip(self.downs, self.shrink, strict=True):
            skips.append(h := block(h, emb))
            h = shrink(h)
        if isinstance(self.mid, Attention):
            tokens = h.flatten(2).transpose(1, 2)
            tokens = self.mid(tokens, tokens if context is None else context)
            h = h + tokens.transpose(1, 2).reshape(h.shape)
        else:
            h = self.mid(h, emb)
        for block, grow in zip(self.ups, self.grow, strict=True):
            h, skip = grow(h), skips.pop()
            h = block(torch.cat([h, skip], dim=1) if self.spec.skip == "cat" else h + skip, emb)
        y: Tensor = self.conv_out(h)
        return y


class Layer(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        c = spec.channels
        self.act, self.glu = ACTIVATIONS[spec.activation], spec.glu
        self.norm1, self.norm2 = Norm(spec.norm, c, 0), Norm(spec.norm, c, 0)
        self.inject = Inject(spec.inject, spec.emb, c, dims=0, last=True)
        self.attention = Attention(c, c, spec.attention == "fused")
        self.cross = Attention(c, 6, spec.attention == "fused") if spec.context else None
        self.up, self.down = nn.Linear(c, 2 * c * (1 + spec.glu)), nn.Linear(2 * c, c)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        h = self.inject(self.norm1(x), emb)
        x = x + self.attention(h, h)
        if self.cross is not None:
            x = x + self.cross(x, context)
        h = self.up(self.norm2(x))
        if self.glu:
            a, b = h.chunk(2, dim=-1)
            h = a * self.act(b)
        else:
            h = self.act(h)
        y: Tensor = x + self.down(h)
        return y


class Tokens(Network):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        c = spec.channels
        self.patch = nn.Conv2d(3, c, 2, stride=2) if spec.dims == 2 else nn.Linear(3, c)
        self.position = nn.Parameter(torch.randn((SIZE // 2) ** 2 if spec.dims == 2 else TOKENS, c) / 4)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.depth))
        self.norm, self.out = Norm(spec.norm, c, 0), nn.Linear(c, 3 * (4 if spec.dims == 2 else 1))

    def body(self, sample: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = self.patch(sample)
        if self.spec.dims == 2:
            x = x.flatten(2).transpose(1, 2)
        x = x + self.position
        if self.spec.inject == "token":
            x = torch.cat([emb[:, None].expand(x.shape[0], -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x, emb, context)
        if self.spec.inject == "token":
            x = x[:, 1:]
        y: Tensor = self.out(self.norm(x))
        if self.spec.dims == 2:
            y = y.unflatten(1, (SIZE // 2, SIZE // 2)).unflatten(3, (3, 2, 2))
            y = y.permute(0, 3, 1, 4, 2, 5).reshape(sample.shape)
        return y


def build(spec: Spec) -> Network:
    """Return the network in eval mode. Its batch norms have running statistics as after training."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(spec.seed)
        network = (UNet if spec.body == "unet" else Tokens)(spec).eval()
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return network


def timesteps(spec: Spec) -> Tensor:
    return (
        torch.linspace(0.9, 0.1, 5) if spec.embedding == "fourier" else torch.tensor([801, 600, 401, 200, 3])
    )


def arguments(spec: Spec, rows: int, *, seed: int = 0) -> dict[str, Any]:
    """Return arguments of forward with `rows` rows each; the timesteps take turns."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    shape = (TOKENS, 3) if spec.body == "tokens" and spec.dims == 1 else (3, *[SIZE] * spec.dims)
    found: dict[str, Any] = {
        "sample": noise(*shape),
        "timestep": timesteps(spec).repeat(-(-rows // 5))[:rows],
    }
    if spec.context and spec.attention != "none":
        found["context"] = noise(CONTEXT, 6)
    if spec.conditioning == "label":
        found["condition"] = torch.randint(0, LABELS, (rows,), generator=generator)
    elif spec.conditioning == "nested":
        found["added"] = {"condition": noise(3)}
    elif spec.conditioning != "none":
        found["condition"] = noise(3)
    return found


def calibration(spec: Spec, rows: int = 20) -> tfmq_fx.CalibrationSet:
    return tfmq_fx.CalibrationSet.from_tensors(arguments(spec, rows))
