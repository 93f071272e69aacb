"""Lay rows that have one timestep each side by side, as samples that have several: (N, tokens), (N, 1, frames, 1, 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def per_sample(timestep: Tensor) -> Tensor:
    """Return one timestep for each sample (N,): the largest of its entries.

    That is the one of what is being denoised, where given frames have 0; else the noisiest. Statistics that need one
    timestep per sample take it.
    """
    return timestep if timestep.dim() < 2 else timestep.flatten(1).amax(1)


def entries_of(rows: Mapping[str, Tensor], timestep: str) -> dict[str, Tensor]:
    """Return rows with a timestep for each entry: every sample's other inputs are repeated. Those with one stay as they are."""
    t = rows[timestep]
    if t.dim() < 2:
        return dict(rows)
    return {
        n: t.reshape(-1) if n == timestep else x.repeat_interleave(t[0].numel(), 0) for n, x in rows.items()
    }


def packed(
    rows: Mapping[str, Tensor], timestep: str, shape: Sequence[int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return rows (R, ...) as as few samples (S, ...) as possible, and where each row is among the S * K entries (R,).

    Samples whose rows do not fill them repeat one.

    rows: one timestep each, (R,). Rows share a sample only if their other inputs are equal.
    shape: of a sample's timestep, which has K entries.
    """
    size, t = math.prod(shape), rows[timestep]
    others = [x.reshape(len(t), -1).double() for n, x in rows.items() if n != timestep]
    group = torch.zeros(len(t), dtype=torch.long)
    if others:
        group = torch.cat(others, dim=1).unique(dim=0, return_inverse=True)[1].cpu()
    slots = []
    for number in range(int(group.max()) + 1):
        own = (group == number).nonzero().flatten()
        slots.append(torch.cat([own, own[-1:].expand(-len(own) % size)]))
    slot = torch.cat(slots)
    where = torch.empty_like(group)
    where[slot.flip(0)] = torch.arange(len(slot)).flip(0)  # the first of several
    samples = {n: x[slot].reshape(-1, *shape) if n == timestep else x[slot[::size]] for n, x in rows.items()}
    return samples, where
