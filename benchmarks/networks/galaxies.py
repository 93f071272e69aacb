"""Trained networks from outside: the score networks of galaxies of the wheel galaxygrad (M. Sampson).

The wheel ships them as leaves of Equinox modules. Each is an MLP-Mixer that gives the score of pictures `y` at the
time `t` of the process dy = -y/2 dt + dw, from 0 to 10. A picture is the logarithm of brightness, log(1 + x) / 0.1.
They are read into a torch module here. The weights are not kept in this repository.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.networks.wheels import wheel_file

WHEEL = "galaxygrad==0.1.5"
NETWORKS = {  # survey and size: file
    "hsc32": "galaxygrad/eqx_hsc_ScoreNet32.eqx",
    "hsc64": "galaxygrad/eqx_hsc_ScoreNet64.eqx",
    "ztf32": "galaxygrad/eqx_ZTF_ScoreNet32.eqx",
    "ztf64": "galaxygrad/eqx_ZTF_ScoreNet64.eqx",
}
CACHE = Path.home() / ".cache" / "galaxies"
PATCH, CHANNELS, WIDTH, BLOCKS = 4, 64, 512, 4
LAST_TIME, FIRST_TIME, STEPS = 10.0, 0.018, 25


class MixerBlock(nn.Module):
    """One MLP over the patches of each channel, and one over the channels of each patch."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patch_mixer = _mlp(patches)
        self.hidden_mixer = _mlp(CHANNELS)
        self.norm1 = nn.LayerNorm((CHANNELS, patches))
        self.norm2 = nn.LayerNorm((patches, CHANNELS))

    def forward(self, y_NCP: Tensor) -> Tensor:
        y_NCP = y_NCP + self.patch_mixer(self.norm1(y_NCP))
        y_NPC = y_NCP.transpose(1, 2)
        y_NPC = y_NPC + self.hidden_mixer(self.norm2(y_NPC))
        mixed: Tensor = y_NPC.transpose(1, 2)
        return mixed


def _mlp(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, size))


class Galaxies(nn.Module):
    """The network, by its name in NETWORKS. Its parameters are declared in the order of the file's leaves."""

    def __init__(self, name: str, file: Path | None = None) -> None:
        super().__init__()
        self.size = int(name[-2:])
        patches = (self.size // PATCH) ** 2
        self.conv_in = nn.Conv2d(2, CHANNELS, PATCH, stride=PATCH)
        self.conv_out = nn.ConvTranspose2d(CHANNELS, 1, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(MixerBlock(patches) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm((CHANNELS, patches))
        self._read(file or wheel_file(WHEEL, NETWORKS[name], CACHE))

    def _read(self, file: Path) -> None:
        """Fill the parameters from a file of arrays, one .npy after another. The last one is the time's scale.

        Raises ValueError for a file with other leaves.
        """
        with file.open("rb") as leaves, torch.no_grad():
            for parameter in self.parameters():
                leaf = torch.from_numpy(np.load(leaves))
                if parameter is self.conv_out.weight:  # Equinox's is (out, in, ..), and turned
                    leaf = leaf.transpose(0, 1).flip(2, 3)
                parameter.copy_(leaf.reshape(parameter.shape))
            if np.load(leaves) != LAST_TIME or leaves.read():
                raise ValueError(f"{file}: has other leaves than this network; give the wheel's file for it.")
        self.requires_grad_(False)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        """y (N, 1, size, size); t (N,). Returns the score (N, 1, size, size). The time is a channel of the input."""
        time = (t / LAST_TIME).reshape(-1, 1, 1, 1).expand_as(y)
        h: Tensor = self.conv_in(torch.cat([y, time], dim=1))
        shape = h.shape[2:]
        h = h.flatten(2)
        for block in self.blocks:
            h = block(h)
        score: Tensor = self.conv_out(self.norm(h).unflatten(2, shape))
        return score


def times() -> Tensor:
    """Return the sampler's times (25,), from 10 to 0.018, evenly in their logarithm."""
    return torch.tensor([LAST_TIME * (FIRST_TIME / LAST_TIME) ** (i / (STEPS - 1)) for i in range(STEPS)])


def noise(count: int, size: int, *, seed: int) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trajectory(network: Callable[..., Tensor], y: Tensor) -> Tensor:
    """Return (26, N, 1, size, size): the noise `y`, the pictures after each step of DDIM, and so the samples last.

    (Song et al. 2021, eq. 12 with sigma = 0; here alpha = exp(-t), and epsilon = -score * sqrt(1 - alpha).)
    """
    found = [y]
    alphas = torch.cat([torch.exp(-times()), torch.ones(1)])
    for t, alpha, following in zip(times(), alphas, alphas[1:], strict=False):
        epsilon = -network(y, t.expand(len(y))).float() * (1 - alpha).sqrt()
        clean = (y - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        y = following.sqrt() * clean + (1 - following).sqrt() * epsilon
        found.append(y)
    return torch.stack(found)


def rows(network: Galaxies, count: int, *, seed: int) -> dict[str, Tensor]:
    """Return what the network is given for `count` samples: 25 rows of each, by the names of its arguments."""
    found = trajectory(network, noise(count, network.size, seed=seed))[:-1]
    return {"y": found.flatten(0, 1), "t": times().repeat_interleave(count)}
