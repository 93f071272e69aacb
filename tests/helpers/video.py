"""A network for videos that repeats the embedding of its timestep for each frame, as published ones do."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.networks.small import sinusoid

TIMESTEPS = torch.tensor([900, 500, 100, 0])
BLOCK = ("time.0.weight", "time.2.weight", "spatial.weight", "temporal.weight")


class Video(nn.Module):
    """A convolution of each frame (I2VGen), and a layer over all, which also knows their positions (Stable Video Diffusion)."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.spatial, self.temporal, self.place = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, 16)
        self.a, self.mid, self.b = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Linear(16, 16),
            nn.Conv2d(16, 3, 3, padding=1),
        )

    def forward(self, sample, timestep):
        n, _, frames, height, width = sample.shape
        emb = self.time(sinusoid(timestep, 16)).repeat_interleave(frames, dim=0)
        h = self.a(sample.permute(0, 2, 1, 3, 4).flatten(0, 1)) + self.spatial(F.silu(emb))[:, :, None, None]
        h = F.silu(h).reshape(n, frames, 16, height, width).permute(0, 3, 4, 1, 2)
        when = self.temporal(F.silu(emb.reshape(n, frames, -1)))[:, None, None]
        h = h + self.mid(h.mean(3, keepdim=True) + when + self.place(sinusoid(torch.arange(frames), 16)))
        return (
            self.b(F.silu(h).permute(0, 3, 4, 1, 2).flatten(0, 1)).unflatten(0, (n, frames)).transpose(1, 2)
        )


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Video().eval()


def inputs(rows, frames=3, size=(8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, frames, *size, generator=generator)
    return x, TIMESTEPS[torch.randint(0, 4, (rows,), generator=generator)]
