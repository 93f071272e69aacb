"""Networks for the low-bit passes: a body between a first and a last layer, plus a timestep embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, make, sinusoid
from tfmq_fx.graph.nodes import edge_layers, op_name
from tfmq_fx.graph.state import captured_of
from tfmq_fx.passes import find_temporal


class Between(nn.Module):
    """A network sample -> first -> + embedding -> body -> last of tokens (N, S, C) or images (N, C, H, W)."""

    def __init__(self, body: nn.Module, *, channels: int = 8, out: int = 8, image: bool = False) -> None:
        super().__init__()
        layer = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if image else nn.Linear
        self.time, self.first, self.last = nn.Linear(8, channels), layer(3, channels), layer(out, 3)
        self.body, self.image = body, image

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        t = self.time(sinusoid(timestep, 8))
        t = t[:, :, None, None] if self.image else t[:, None]
        y: Tensor = self.last(self.body(self.first(sample) + t))
        return y


def data(image: bool = False, rows: int = 20) -> tfmq_fx.CalibrationSet:
    shape = (3, 6, 6) if image else (5, 3)
    sample = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(3))
    return tfmq_fx.CalibrationSet.from_tensors(
        {"sample": sample, "timestep": TIMESTEPS.repeat(-(-rows // 10))[:rows]}
    )


def graph(body, image: bool = False, **sizes: int) -> torch.fx.GraphModule:
    """Return a captured network around the module that `body()` makes."""
    network = make(lambda: Between(body(), image=image, **sizes))  # type: ignore[arg-type]
    return tfmq_fx.capture(network, {n: x[:2] for n, x in data(image).tensors.items()})


def run(gm: torch.fx.GraphModule, image: bool = False, rows: int = 7) -> Tensor:
    """Return the output for a batch size that the capture did not see."""
    with torch.no_grad():
        y: Tensor = gm(*data(image, rows).tensors.values())
    return y


def operators(gm: torch.fx.GraphModule) -> list[str]:
    """Return the operators of the data path, from after the embedding's add to the output."""
    names = [op_name(n) for n in gm.graph.nodes if n.op == "call_function" and op_name(n) != "sym_size"]
    return names[names.index("add") + 1 :]


def done(gm: torch.fx.GraphModule, name: str) -> dict[str, str]:
    """Return what a pass did to the layers between the first and the last: path of the weight -> change."""
    return {
        c.name.removeprefix("body."): c.how
        for c in captured_of(gm).low_bits[name]
        if c.reason != "first or last layer"
    }


class Attention(nn.Module):
    """Self-attention with heads of 4 channels, and q, k and v from one layer or from three."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.norm, self.fused = nn.LayerNorm(8), fused
        if fused:
            self.qkv = nn.Linear(8, 24)
        else:
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        parts = self.qkv(h).chunk(3, dim=-1) if self.fused else (self.q(h), self.k(h), self.v(h))
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        z: Tensor = x + self.out(y.transpose(1, 2).flatten(2))
        return z


class Gated(nn.Module):
    """GEGLU: one half of a layer's channels times the gelu of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.project(x).chunk(2, dim=-1)
        y: Tensor = self.out(x * nn.functional.gelu(gate))
        return y


class Twice(nn.Module):
    """A second layer whose input something else reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y: Tensor = self.b(h) + h.sigmoid()
        return y


class Shared(nn.Module):
    """A weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(self.a(x).sin()))
        return y


class Itself(nn.Module):
    """Attention whose query, key and value are the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        v = self.a(x)
        y: Tensor = self.b(nn.functional.scaled_dot_product_attention(v, v, v) * 2.0)
        return y


class Squared(nn.Module):
    """A product that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y: Tensor = self.b(h * h)
        return y


def edges(gm):
    return {n.name for n in edge_layers(gm, timestep=find_temporal(gm).timestep)}
