"""Small networks in plain torch, so that tests need no diffusers classes."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tfmq_fx


def sinusoid(t: Tensor, dim: int) -> Tensor:
    number = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    frequency = torch.exp(number * (-math.log(10000.0) / (dim // 2)))
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


class OneTimestep(ScalarTime):
    """A module whose timestep always has shape (): its sinusoids are a vector without a batch dimension."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angle = timestep.float() * torch.exp(-2.0 * torch.arange(4.0))
        shift = self.time(torch.cat([angle.sin(), angle.cos()]))
        y: Tensor = self.head(F.gelu(self.body(sample) + shift))
        return y


class Labelled(nn.Module):
    """A class-conditional network: the label joins the time embedding before the non-linearity."""

    classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.time, self.label = nn.Linear(8, 16), nn.Embedding(self.classes, 16)
        self.emb1, self.emb2 = nn.Linear(16, 4), nn.Linear(16, 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.mid = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        emb = F.silu(self.time(sinusoid(timestep, 8)) + 3 * self.label(class_labels))
        h = F.silu(self.conv1(sample) + self.emb1(emb)[:, :, None, None])
        y: Tensor = self.conv2(F.silu(self.mid(h) + self.emb2(emb)[:, :, None, None]))
        return y


class Sized(nn.Module):
    """A network with SD-XL's inputs: pooled text and size ids in a dict, and a sequence of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.add = nn.Linear(8, 16), nn.Linear(24, 16)
        self.emb, self.conv1, self.conv2 = nn.Linear(16, 4), nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        self.text = nn.Linear(6, 4)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        scale: float | None = None,
        return_dict: bool = True,
    ) -> dict[str, Tensor] | tuple[Tensor]:
        assert added_cond_kwargs is not None
        ids, text = added_cond_kwargs["time_ids"], added_cond_kwargs["text_embeds"]
        add = torch.cat([text, sinusoid(ids.flatten(), 8).reshape(text.shape[0], -1)], dim=1)
        emb = F.silu(self.time(sinusoid(timestep, 8)) + self.add(add))
        h = self.conv1(sample) + self.emb(emb)[:, :, None, None]
        h = h + self.text(encoder_hidden_states).mean(1)[:, :, None, None] * (scale or 1.0)
        y: Tensor = self.conv2(F.silu(h))
        return {"sample": y} if return_dict else (y,)


class Tokens(nn.Module):
    """A transformer on patches: convolutions at both ends, one of them transposed, and linears between."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.emb = nn.Linear(32, 2 * width)
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.unpatch = nn.ConvTranspose2d(width, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        shift, scale = self.emb(F.silu(self.time(sinusoid(timestep, 16)))).chunk(2, dim=1)
        x = self.patch(sample).flatten(2).transpose(1, 2)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        x = x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))
        x = x.transpose(1, 2).unflatten(2, (4, 4))
        z: Tensor = self.head(F.silu(self.unpatch(F.silu(self.mix(x)))))
        return z


class Deep(nn.Module):
    """Residual linear layers, each with a temporal feature: layers * 2 * width ** 2 weights."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Linear(32, width)
        self.embs = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        emb = F.silu(self.time(sinusoid(timestep, 32)))
        for layer, temporal in zip(self.layers, self.embs, strict=True):
            sample = sample + F.silu(layer(sample) + temporal(emb))
        return sample


class Listed(nn.Module):
    """Lists of pictures (2, H, W) and of prompts (words, 6), whose sizes may differ, in and a list of pictures out.

    Each prompt is padded to a multiple of four words by a word of its own, and all samples to the longest of the call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = nn.Conv2d(2, 8, 2, stride=2), nn.Linear(6, 8)
        self.padding = nn.Parameter(torch.randn(1, 8))
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: list[Tensor], t: Tensor, words: list[Tensor]) -> dict[str, list[Tensor]]:
        samples = []
        for picture, prompt in zip(x, words, strict=True):
            patches = self.patches(picture[None]).flatten(2).transpose(1, 2)[0]
            missing = -len(prompt) % 4
            prompt = self.words(prompt)
            if missing:
                prompt = torch.cat([prompt, self.padding.expand(missing, -1)])
            samples.append(torch.cat([patches, prompt]))
        lengths = [len(s) for s in samples]
        mask = None
        if any(n != lengths[0] for n in lengths):
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            mask = mask[:, None]
        h = nn.utils.rnn.pad_sequence(samples, batch_first=True) + self.time(sinusoid(t, 8))[:, None]
        h = h + nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), mask)
        h = self.out(h)
        made = []
        for picture, sample in zip(x, h.unbind(0), strict=True):
            rows, columns = (n // 2 for n in picture.shape[1:])
            made.append(nn.functional.pixel_shuffle(sample[: rows * columns].T.reshape(8, rows, columns), 2))
        return {"sample": made}


def listed(rows: int = 24, lengths: tuple[int, ...] = (3, 7), seed: int = 0) -> dict[str, Any]:
    """Return the arguments of `rows` samples for `Listed`, with prompts of these lengths in turn."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": [torch.randn(2, 8, 8, generator=g) for _ in range(rows)],
        "t": torch.tensor([900.0, 500.0, 100.0]).repeat(rows)[:rows],
        "words": [torch.randn(lengths[i % len(lengths)], 6, generator=g) for i in range(rows)],
    }


class Experts(nn.Module):
    """Tokens (N, T, 8) that go to two of four experts each, and layers (K, N, words, 6) of a language model, samples second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.words = nn.ModuleList(nn.Linear(6, 16) for _ in range(2))
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(4)
        )

    def forward(self, x: Tensor, timestep: Tensor, layers: Tensor) -> Tensor:
        h = self.first(x) + self.time(sinusoid(timestep, 8))[:, None]
        for words, layer in zip(self.words, (layers[0], layers[2]), strict=True):
            h = h + words(layer).mean(1, keepdim=True)
        out: Tensor = self.last(h + self.routed(h))
        return out

    def routed(self, h: Tensor) -> Tensor:
        tokens = h.reshape(-1, 16)
        weights, chosen = torch.topk(self.gate(tokens).softmax(-1), 2)
        order = chosen.flatten().argsort()
        made, first = torch.zeros_like(tokens), 0
        for expert, last in zip(
            self.experts, chosen.flatten().bincount(minlength=4).cumsum(0).tolist(), strict=True
        ):
            own = order[first:last] // 2
            y = expert(tokens[own]) * weights.reshape(-1, 1)[order[first:last]]
            made.index_add_(0, own, y)
            first = last
        return made.view_as(h)


def experts(
    rows: int = 24, layers: int = 3, words: int = 5, tokens: int = 12, seed: int = 0
) -> dict[str, Any]:
    """Return the arguments of `rows` samples for `Experts`."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, tokens, 8, generator=g),
        "timestep": torch.tensor([900.0, 500.0, 100.0]).repeat(rows)[:rows],
        "layers": torch.randn(layers, rows, words, 6, generator=g),
    }


def make(cls: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().eval()


TIMESTEPS = torch.arange(0, 1000, 100).flip(0)


def calibration(rows: int = 40, seed: int = 0) -> tfmq_fx.CalibrationSet:
    """Return calibration noise with a few rows at every timestep of TIMESTEPS."""
    generator = torch.Generator().manual_seed(seed)
    return tfmq_fx.CalibrationSet.from_tensors(
        {
            "sample": torch.randn(rows, 1, 8, 8, generator=generator),
            "timestep": TIMESTEPS.repeat(-(-rows // 10))[:rows],
        }
    )


def vectors() -> tfmq_fx.CalibrationSet:
    """Return calibration data for ScalarTime and OneTimestep."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    return tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": TIMESTEPS.repeat(4)})


def labelled_data(rows: int = 60, seed: int = 0) -> tfmq_fx.CalibrationSet:
    g = torch.Generator().manual_seed(seed)
    return tfmq_fx.CalibrationSet.from_tensors(
        {
            "sample": torch.randn(rows, 1, 6, 6, generator=g),
            "timestep": TIMESTEPS.repeat(rows)[:rows],
            "class_labels": torch.randint(0, Labelled.classes, (rows,), generator=g),
        }
    )


def sized_data(rows: int = 40, seed: int = 0) -> tfmq_fx.CalibrationSet:
    g = torch.Generator().manual_seed(seed)
    return tfmq_fx.CalibrationSet.from_tensors(
        {
            "sample": torch.randn(rows, 1, 6, 6, generator=g),
            "timestep": TIMESTEPS.repeat(rows)[:rows],
            "encoder_hidden_states": torch.randn(rows, 3, 6, generator=g),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(rows, 8, generator=g),
                "time_ids": torch.tensor([[8.0, 8.0], [6.0, 8.0]]).repeat(rows, 1)[:rows],
            },
        }
    )


CALIBRATION = {TinyUNet: calibration, Tokens: calibration, Labelled: labelled_data, Sized: sized_data}


FAST = tfmq_fx.Reconstruction(
    iterations=20, temporal_iterations=100, num_samples=40, batch_size=20, tune_iterations=0
)


def prepared(**changes: object) -> torch.fx.GraphModule:
    """Return a calibrated graph of the tiny network."""
    recipe = tfmq_fx.Recipe(reconstruction=FAST, **changes)  # type: ignore[arg-type]
    gm = captured()
    return tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), calibration())


def captured(cls: Any = TinyUNet) -> torch.fx.GraphModule:
    """Return a captured graph that the caller may change."""
    return copy.deepcopy(_captured(cls))


@functools.cache
def _captured(cls: type[nn.Module]) -> torch.fx.GraphModule:
    example = {n: x[:2] for n, x in calibration().tensors.items()}
    return tfmq_fx.capture(make(cls), example)
