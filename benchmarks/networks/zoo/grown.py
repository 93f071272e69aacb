"""Calls of the zoo's networks with a row more than they were captured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.networks.zoo.entry import Entry
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.second_rows import rows_of_call


def grown(entry: Entry, network: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network as it takes rows, and the arguments of a call with one more than the entry's, if it has a timestep for each."""
    inputs = dict(entry.inputs(False))
    if not inputs[entry.timestep].dim():
        return network, inputs
    batch = inputs[entry.timestep].shape[0]
    if "img_shapes" in inputs:  # a plain list with an entry for each row
        inputs["img_shapes"] = inputs["img_shapes"][:1] * (batch + 1)
    lists = rows_of_call(network, inputs, entry.timestep)
    if lists is not None:
        network, inputs = lists.batched(network), lists.taken(inputs)

    def more(x: Any) -> Any:
        return torch.cat([x, x.flip(0)[:1]]) if isinstance(x, Tensor) and x.shape[:1] == (batch,) else x

    return network, pytree.tree_map(more, inputs)


def by_name(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a call by the names of a graph's inputs."""
    return {n: x for n, (_, x) in leaves(inputs).items() if isinstance(x, Tensor)}
