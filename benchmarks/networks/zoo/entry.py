"""What the zoo holds of each network, and what its entries are written with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network, how to call it, and the truth about its temporal block.

    `build(False)` has random weights and a reduced size, `build(True)` the published size (construct it on
    the meta device or under FakeTensorMode); `inputs` gives forward's keyword arguments likewise. The paths
    are those of the reduced size.
    """

    name: str
    build: Callable[[bool], nn.Module]
    inputs: Callable[[bool], dict[str, Any]]
    timestep: str = "timestep"
    features: tuple[str, ...]
    layers: tuple[str, ...]  # the features and every weighted layer ahead of them, conditioning-only ones too
    keys: tuple[
        str, ...
    ]  # the inputs the features are functions of, timestep first, nested names joined by _
    pure_features: tuple[str, ...]
    pure_layers: tuple[str, ...]
    bitwise_note: str = ""


def builder(
    make: Callable[..., nn.Module], published: dict[str, Any], small: dict[str, Any]
) -> Callable[[bool], nn.Module]:
    """A network of the published configuration, or of that with the sizes in `small`."""

    def build(real: bool) -> nn.Module:
        if real:
            return make(**published).eval()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            network = make(**{**published, **small}).eval()
            for parameter in network.parameters():
                # A zero-initialised layer (adaLN-zero, the last convolution of a residual branch) would make
                # what lies behind it constant by accident.
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.2)
        return network

    return build


def of_timestep(
    name: str,
    make: Callable[..., Any],
    small: dict[str, Any],
    inputs: Callable[[bool], dict[str, Any]],
    *,
    before: tuple[str, ...],
    features: tuple[str, ...],
    published: dict[str, Any] | None = None,
    timestep: str = "timestep",
    bitwise_note: str = "",
) -> Entry:
    """A network whose block depends on the timestep alone. before: the layers ahead of the features."""
    return Entry(
        name=name, build=builder(make, published or {}, small), inputs=lambda real: {**inputs(real), "return_dict": False},
        timestep=timestep, features=features, layers=(*before, *features), keys=(timestep,), pure_features=features,
        pure_layers=(*before, *features), bitwise_note=bitwise_note,
    )  # fmt: skip


def noise(*shape: int) -> Tensor:
    """Fixed numbers without a generator, so that this works on the meta device and on fake tensors too."""
    k = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (1.4 * torch.sin(0.7548776662 * k * k)).float().reshape(shape)


def steps(*values: float) -> Tensor:
    return torch.tensor(values or (17, 803))


def resnets(
    *, down: Iterable[int], up: Iterable[int], mid: int = 2, projections: tuple[str, ...] = ("time_emb_proj",)
) -> tuple[str, ...]:
    """The time projections of a diffusers U-Net with so many residual blocks per level."""
    blocks = [
        *(f"down_blocks.{i}.resnets.{j}" for i, n in enumerate(down) for j in range(n)),
        *(f"mid_block.resnets.{j}" for j in range(mid)),
        *(f"up_blocks.{i}.resnets.{j}" for i, n in enumerate(up) for j in range(n)),
    ]
    return tuple(f"{block}.{projection}" for block in blocks for projection in projections)


def pair(module: str) -> tuple[str, str]:
    """diffusers' TimestepEmbedding and PixArtAlphaTextProjection: two Linears."""
    return f"{module}.linear_1", f"{module}.linear_2"


TIME = pair("time_embedding")
ADD = pair("add_embedding")
FLOAT = steps(17.5, 803.25)
WORDS = 5  # tokens of the reduced prompt
