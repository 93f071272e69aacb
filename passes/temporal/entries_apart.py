"""Check that a temporal block treats the timesteps of one sample apart, by what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import attribute, count, fresh, hinted_shape, meta_value, weight_path
from tfmq_fx.graph.written import keeps_buffers
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal

MOST_RUNS = 4
SAME = 1e-2  # of the distance between the features of two timesteps


@keeps_buffers
@torch.no_grad()
def require_entries_apart(gm: GraphModule, temporal: TemporalBlock, timesteps: Tensor) -> None:
    """Raise TFMQError, naming the feature, unless each of its values is a function of one entry of the timestep, (N, tokens).

    Shapes do not tell: (N, tokens) may be the mean of a sample's timesteps, beside as many channels, and (N * tokens,) may be in
    another order. So the block is run on two timesteps, on each alone and on mixtures of both. It is not run where the
    timestep has one entry per sample, where the graph has no shapes, and where its weights are on the meta device.

    timesteps (T,): the schedule.
    """
    source = placeholders(gm)[temporal.timestep]
    t = meta_value(source)
    if not isinstance(t, Tensor) or t.dim() < 2 or len(timesteps) < 2:
        return
    block = extract_temporal(fresh(gm), temporal)
    if any(attribute(block, str(n.target)).is_meta for n in block.graph.find_nodes(op="get_attr")):
        return
    sizes = hinted_shape(source)
    low, high = (x.to(t.dtype).expand(sizes) for x in (timesteps.amin(), timesteps.amax()))
    paths = {n.name: weight_path(n) or n.name for n in gm.graph.nodes if n.name in temporal.features}
    ends = [_run(block, temporal.timestep, x) for x in (low, high)]
    for mask in _masks(sizes):
        mixed = _run(block, temporal.timestep, torch.where(mask, high, low))
        for name, shape, a, b, x in zip(temporal.features, _shapes(block), *ends, mixed, strict=True):
            near = SAME * (a - b).abs()
            is_a, is_b = (x - a).abs() <= near, (x - b).abs() <= near
            if not (is_a | is_b).all():
                raise TFMQError(
                    f"{paths[name]}: mixes the timesteps of a sample, {temporal.timestep} of shape {_words(sizes)}; only a network "
                    "that computes each token's or frame's features from its own timestep can have them in a table."
                )
            by_row = count(shape[:1]) == count(t.shape)
            if by_row and not torch.where(mask.reshape(-1), _rows(is_b), _rows(is_a)).all():
                raise TFMQError(
                    f"{paths[name]}: its rows are the entries of {temporal.timestep}, of shape {_words(sizes)}, in another order; "
                    "flatten the timestep sample by sample."
                )


def _run(block: GraphModule, timestep: str, t: Tensor) -> list[Tensor]:
    """Return the block's features for these timesteps, and for zeros as its other inputs: the sum of each row."""
    inputs = [
        (t if name == timestep else torch.zeros(hinted_shape(node), dtype=meta_value(node).dtype)).to(
            meta_value(node).device
        )
        for name, node in placeholders(block).items()
    ]
    return [f.double().sum(-1).cpu() if f.dim() > 1 else f.double().cpu() for f in block(*inputs)]


def _rows(found: Tensor) -> Tensor:
    return found.flatten(1).all(1) if found.dim() > 1 else found


def _masks(sizes: list[int]) -> list[Tensor]:
    """Return masks of the entries: together, up to 16 of them have different ones each."""
    total = torch.Size(sizes).numel()
    number = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    bits = min(MOST_RUNS, (total - 1).bit_length())
    return [(number >> i & 1).bool().reshape(sizes) for i in range(bits)]


def _shapes(block: GraphModule) -> list[torch.Size]:
    features: Any = block.graph.output_node().args[0]
    return [meta_value(n).shape for n in features]


def _words(sizes: list[int]) -> str:
    return f"(N, {', '.join(map(str, sizes[1:]))})"
