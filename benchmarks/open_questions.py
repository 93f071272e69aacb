"""Does quantization by timestep work beyond the papers: in continuous time, and without diffusion?

    python -m benchmarks.open_questions

flow        the trained flow-matching UNet of benchmarks/zoo, whose time is a float. It is quantized on the times
            of 20 Euler steps, and sampled with those, with others between them, and with a time drawn at random
            in every step
generator   the decoder of a conditional variational autoencoder: noise and a label to a digit in one call. Its
            finite input is the label: `timestep="label"` finds the label's block, keys its scales on the ten
            labels and reconstructs it over them

The generator is trained here, seeded, in a few minutes. GPTQ rounds the rest of each network. PSNR is to the
float network's samples of the same noise, as the mean of 256 samples (flow: 64). "recognised" is the share
recognised with confidence over 0.9 (generator: as the label asked for).
"""

from __future__ import annotations

import dataclasses
import platform
from itertools import pairwise, product
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.ablation import VARIANTS
from benchmarks.digits import digits, recognise, train_classifier
from benchmarks.zoo.flow_digits import flow_digits_pipeline
from tfmq_fx.base.metrics import psnr_by_image

SAMPLES, LATENT = 256, 16


class Block(nn.Module):
    """A residual block whose normalized features are scaled and shifted by an embedding."""

    def __init__(self, channels: int, emb: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm, self.emb = nn.GroupNorm(8, channels), nn.Linear(emb, 2 * channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.conv1(F.silu(x))) * (1 + scale) + shift
        y: Tensor = x + self.conv2(F.silu(h))
        return y


class Generator(nn.Module):
    """A decoder from noise (N, 16) and labels (N,) to images (N, 1, 16, 16) in [-1, 1]."""

    def __init__(self, channels: int = 32, emb: int = 128) -> None:
        super().__init__()
        self.label = nn.Embedding(10, emb)
        self.mlp = nn.Sequential(nn.Linear(emb, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.start, self.channels = nn.Linear(LATENT, channels * 16), channels
        self.blocks = nn.ModuleList(Block(channels, emb) for _ in range(4))
        self.end = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        emb = self.mlp(self.label(label))
        h = self.start(z).reshape(-1, self.channels, 4, 4)
        for i, block in enumerate(self.blocks):
            h = block(h, emb)
            if i < 2:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return torch.tanh(self.end(F.silu(h)))


def train_generator(*, steps: int = 1000, batch: int = 64) -> Generator:
    torch.manual_seed(0)
    x_N1HW, label_N = digits()
    net = Generator()
    encoder = nn.Sequential(
        nn.Conv2d(11, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(512, 2 * LATENT)
    )  # fmt: skip
    parameters = [*net.parameters(), *encoder.parameters()]
    opt = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x_N1HW), (batch,))
        x, label = x_N1HW[rows], label_N[rows]
        planes = F.one_hot(label, 10).float()[:, :, None, None].expand(-1, -1, *x.shape[2:])
        mean, log_variance = encoder(torch.cat([x, planes], 1)).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        loss = (net(z, label) - x).square().sum((1, 2, 3)).mean() + divergence
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        schedule.step()
    return net.eval()


def euler(count: int) -> Tensor:
    """Return the scheduler's times, from 1 to 0."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(count)
    return torch.as_tensor(scheduler.sigmas)


def jittered(count: int) -> Tensor:
    """Return times from 1 to 0, each drawn at random around its place in an even schedule."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.linspace(1, 0, count + 1)[1:-1] + (torch.rand(count - 1, generator=generator) - 0.5) / count
    return torch.cat([torch.ones(1), inner, torch.zeros(1)])


@torch.no_grad()
def flow(network: Any, noise: Tensor, sigmas: Tensor, seen: list[dict[str, Tensor]] | None = None) -> Tensor:
    x = noise
    for now, after in pairwise(sigmas):
        t = (1000 * now).expand(len(x))
        if seen is not None:
            seen.append({"sample": x, "timestep": t})
        x = x + (after - now) * network(x, t).sample
    return x


def recipe(bits: str, variant: str) -> tfmq_fx.Recipe:
    changes = dict(VARIANTS[variant])
    rounding = tfmq_fx.Reconstruction(
        method="gptq", temporal_method=changes.pop("temporal_method"), tune_iterations=0
    )
    weight, activation = (int(b) for b in bits[1:].split("a"))
    plain = tfmq_fx.Recipe(weight_bits=weight, activation_bits=activation)
    return dataclasses.replace(plain, reconstruction=rounding, **changes)


def distance(q: tfmq_fx.QuantizedModel) -> float:
    rows: list[float] = [e["temporal_cosine_distance"] for e in q.report["errors_by_timestep"]]
    return sum(rows) / len(rows)


def continuous_time(classifier: nn.Module) -> Table:
    net = flow_digits_pipeline().unet
    noise = torch.randn(SAMPLES // 4, 1, 16, 16, generator=torch.Generator().manual_seed(1000))
    calls: list[dict[str, Tensor]] = []
    flow(net, torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)), euler(20), calls)
    data = tfmq_fx.CalibrationSet.from_tensors(
        {n: torch.cat([call[n] for call in calls]) for n in ("sample", "timestep")}
    )
    schedules = {
        "20": euler(20), "10": euler(10), "40": euler(40), "21": euler(21), "20, drawn": jittered(20)
    }  # fmt: skip
    floats = {name: flow(net, noise, s) for name, s in schedules.items()}
    share = (recognise(classifier, floats["20"])[1] > 0.9).float().mean().item()
    table = Table(
        "bits", "block", "cos. distance", *[f"PSNR, {name} steps\n(unseen times)" for name in schedules],
        title=f"flow: quantized on 20 steps; float recognised {share:.1%}",
    )  # fmt: skip
    for bits in ("w8a8", "w4a8", "w4a4"):
        for variant, unseen_by in (
            ("none", "nearest"),
            *product(("TIAR+FSC", "cache"), ("nearest", "float")),
        ):
            chosen = dataclasses.replace(recipe(bits, variant), unseen=unseen_by)
            q = tfmq_fx.quantize(net, chosen, calibration=data)
            cells = []
            for name, sigmas in schedules.items():
                images = flow(q, noise, sigmas)
                unseen = {float(t) for t in 1000 * sigmas[:-1]} - set(data.timesteps.tolist())
                cells.append(f"{psnr_by_image(images, floats[name]).mean():.2f} ({len(unseen)})")
            table.add_row(bits, f"{variant}, unseen: {unseen_by}", f"{distance(q):.1e}", *cells)
    return table


def generator(classifier: nn.Module) -> Table:
    net = train_generator()
    draw = torch.Generator().manual_seed(0)
    data = tfmq_fx.CalibrationSet.from_tensors(
        {"z": torch.randn(1000, LATENT, generator=draw), "label": torch.arange(1000) % 10}, timestep="label"
    )
    z, label = torch.randn(SAMPLES, LATENT, generator=draw.manual_seed(1000)), torch.arange(SAMPLES) % 10

    def right(images: Tensor) -> str:
        found, confidence = recognise(classifier, images)
        return f"{((found == label) & (confidence > 0.9)).float().mean().item():.1%}"

    with torch.no_grad():
        floats = net(z, label)
    table = Table(
        "bits", "label's block", "features", "cos. distance", "PSNR dB", "recognised", "MB",
        title=f"generator, keyed on its label; float recognised {right(floats)}",
    )  # fmt: skip
    for bits in ("w8a8", "w4a8", "w4a4", "w3a8", "w2a8"):
        for variant in ("none", "TIAR+FSC", "cache"):
            q = tfmq_fx.quantize(net, recipe(bits, variant), calibration=data, timestep="label")
            with torch.no_grad():
                images = q(z, label)
            table.add_row(
                bits, variant, str(q.report["temporal_block"]["features"]), f"{distance(q):.1e}",
                f"{psnr_by_image(images, floats).mean():.2f}", right(images),
                f"{q.report['sizes']['quantized_bytes'] / 1e6:.3f}",
            )  # fmt: skip
    return table


def main() -> None:
    classifier = train_classifier()
    console = Console(width=150)
    console.print(generator(classifier))
    console.print(continuous_time(classifier))
    console.print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads", highlight=False
    )


if __name__ == "__main__":
    main()
