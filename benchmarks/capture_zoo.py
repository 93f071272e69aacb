"""Capture every network of benchmarks/networks/zoo, then find and partition its temporal block.

Reduced sizes have real weights, published sizes have fake weights.

python -m benchmarks.capture_zoo [NAME ...]
"""

from __future__ import annotations

import platform
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.zoo import ZOO, Entry
from benchmarks.networks.zoo.grown import by_name, grown
from tfmq_fx.base.second_rows import rows_of_call
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.passes import find_temporal, partition_temporal


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    table = Table(
        "network", "size", "M params", "nodes", "features", "keyed on", "capture s", "pass s", "same"
    )
    for entry in ZOO:
        if not names or entry.name in names:
            for real in (False, True):
                table.add_row(*_row(entry, real=real))
                print(entry.name, real, file=sys.stderr, flush=True)
    Console(width=150).print(table)
    print(
        "pass s: find_temporal and partition_temporal. same: capture and partition against the network, a batch of 3, bitwise or "
        f"but for roundings; fake weights have no values. torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )


def _row(entry: Entry, *, real: bool) -> tuple[str, ...]:
    network, inputs = entry.build(False), entry.inputs(False)
    if real:
        # Which arguments are lists of samples, or have them second, is seen by values, of which fake weights have none.
        lists = rows_of_call(network, inputs, entry.timestep)
        with FakeTensorMode(allow_non_fake_inputs=True):
            network, inputs = _with_all_buffers(entry.build(True)), entry.inputs(True)
            if lists is not None:
                network, inputs = lists.batched(network), lists.taken(inputs)
            return _measure(entry, network, inputs, size="published")
    return _measure(entry, network, inputs, size="reduced")


def _with_all_buffers(network: nn.Module) -> nn.Module:
    """Return the network with its modules' other fake tensors, such as rotary tables, as buffers: torch.export keeps them as they are.

    Lists of them are zeros.
    """
    for module in network.modules():
        for name, value in [*vars(module).items()]:
            if isinstance(value, Tensor):
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)
            elif isinstance(value, list) and any(isinstance(x, Tensor) for x in value):
                with unset_fake_temporarily():
                    setattr(module, name, [torch.zeros(x.shape, dtype=x.dtype) for x in value])
    return network


def _measure(entry: Entry, network: nn.Module, inputs: dict[str, Any], *, size: str) -> tuple[str, ...]:
    started = time.monotonic()
    gm = tfmq_fx.capture(network, inputs, timestep=entry.timestep)
    captured = time.monotonic()
    nodes = len(gm.graph.nodes)
    original = fresh(gm)
    begin = time.monotonic()
    temporal = find_temporal(gm)
    partition_temporal(gm, temporal=temporal)
    passed = time.monotonic()
    equal = ""
    if size == "reduced":
        equal = _same(entry, network, original, gm)
    return (
        entry.name,
        size,
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}",
        str(nodes),
        str(len(temporal.features)),
        ", ".join(temporal.keys),
        f"{captured - started:.1f}",
        f"{passed - begin:.2f}",
        equal,
    )


@torch.no_grad()
def _same(entry: Entry, network: nn.Module, *graphs: torch.fx.GraphModule) -> str:
    network, inputs = grown(entry, network)
    expected, given = pytree.tree_leaves(network(**inputs))[0], by_name(inputs)
    found = [pytree.tree_leaves(g(*[given[n] for n in placeholders(g)]))[0] for g in graphs]
    if all(torch.equal(x, expected) for x in found):
        return "bitwise"
    return "roundings" if all(torch.allclose(x, expected, rtol=1e-4, atol=1e-5) for x in found) else "NO"


if __name__ == "__main__":
    main(sys.argv[1:])
