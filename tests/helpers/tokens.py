"""Networks that take a timestep for each token or frame of a sample, in the ways that published ones do."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.networks.small import sinusoid

TIMESTEPS = torch.tensor([900, 500, 100, 0])
FRAMES, TOKENS = 3, 6  # two tokens of each frame


class Tokens(nn.Module):
    """One timestep for each token, (N, 6).

    where: the step at which the rows of all samples become tokens of each: "early" behind the sinusoids (Wan), "late" behind the
    layers (LTX), "before" them (time at the data's own shape).
    """

    def __init__(self, where="early"):
        super().__init__()
        self.where = where
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64))
        self.proj = nn.Linear(64, 64)
        self.a, self.mid, self.b = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def features(self, timestep, condition=None):
        n, k = timestep.shape
        if self.where == "before":
            angle = timestep[:, :, None] / 10000 ** (torch.arange(8) / 8)
            h = torch.cat([angle.sin(), angle.cos()], -1)
        else:
            h = sinusoid(timestep.flatten(), 16)
        h = h.unflatten(0, (-1, k)) if self.where == "early" else h
        emb = self.time(h)
        emb = emb if condition is None else emb.view(n, k, -1) + condition[:, None]
        return self.proj(F.silu(emb)).view(n, k, -1)

    def forward(self, x, timestep, condition=None):
        scale, shift = self.features(timestep, condition).chunk(2, -1)
        h = self.a(x)
        return self.b(F.silu(h + self.mid(h.mean(1, keepdim=True) * (1 + scale) + shift)))


class Frames(Tokens):
    """One timestep for each frame, (N, 1, 3, 1, 1), which every token of the frame has before a layer reads it (Cosmos)."""

    def features(self, timestep, *_):
        emb = self.time(sinusoid(timestep.flatten(), 16)).view(timestep.shape[0], FRAMES, 1, -1)
        return self.proj(F.silu(emb.expand(-1, -1, TOKENS // FRAMES, -1).flatten(1, 2)))


class Tiled(Tokens):
    """One timestep for each frame, (N, 3); the first token of every frame comes before the second."""

    def features(self, timestep, *_):
        emb = self.time(sinusoid(timestep.flatten(), 16)).view(timestep.shape[0], FRAMES, -1)
        return self.proj(F.silu(emb.repeat(1, TOKENS // FRAMES, 1)))


class Labelled(Tokens):
    """A label of each sample joins the timesteps of its tokens."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(3, 64)

    def forward(self, x, timestep, label):
        return super().forward(x, timestep, self.label(label))


class Guided(Tokens):
    """A number of each sample joins the timesteps of its tokens."""

    def __init__(self):
        super().__init__()
        self.guidance = nn.Linear(1, 64)

    def forward(self, x, timestep, guidance):
        return super().forward(x, timestep, self.guidance(guidance[:, None]))


class Mixed(Tokens):
    """All tokens of a sample have the features of their mean timestep."""

    def features(self, timestep, *_):
        h = sinusoid(timestep.flatten(), 16).unflatten(0, (-1, TOKENS))
        return self.proj(F.silu(self.time(h.mean(1, keepdim=True) + 0 * h)))


class Swapped(Tokens):
    """The rows of the block are the first token of every sample, then the second, .."""

    def features(self, timestep, *_):
        h = self.proj(F.silu(self.time(sinusoid(timestep.T.flatten(), 16))))
        return h.view(TOKENS, timestep.shape[0], -1).transpose(0, 1)


@functools.cache
def network(cls=Tokens, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(*args).eval()


def inputs(rows, shape=(TOKENS,), seed=0, values=TIMESTEPS):
    """Return samples, and timesteps that differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(values), (rows, *shape), generator=generator)
    return torch.randn(rows, TOKENS, 4, generator=generator), values[chosen]
