"""How do capture, find and partition scale? Seconds by nodes, and peak memory beside the float model's.

python -m benchmarks.capture_scale
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.zoo import ZOO
from tfmq_fx.base.arguments import leaves
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.passes import find_temporal, partition_temporal

MODELS = ("sd-1.5", "sd-xl")
NODES = (300, 1000, 3000, 10000)
REPEATS = 3


class Chain(nn.Module):
    """A chain of residual blocks, each with its own temporal feature, for a graph of any size."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.time = nn.Linear(8, 8)
        self.embs = nn.ModuleList(nn.Linear(8, 4) for _ in range(blocks))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(blocks))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angle = timestep.float()[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        emb = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], dim=1)))
        for linear, conv in zip(self.embs, self.convs, strict=True):
            sample = sample + F.silu(conv(sample) + linear(F.silu(emb))[:, :, None, None])
        return sample


def synthetic() -> Table:
    table = Table("nodes", "features", "capture s", "find s", "partition s", "pass us per node")
    inputs = {"sample": torch.randn(2, 4, 4, 4), "timestep": torch.tensor([1, 2])}
    tfmq_fx.capture(Chain(2).eval(), inputs)  # the first export imports modules, which is not timed
    for nodes in NODES:
        network = Chain(nodes // 12).eval()
        rows = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            gm = tfmq_fx.capture(network, inputs)
            captured = time.perf_counter()
            count = len(gm.graph.nodes)
            temporal = find_temporal(gm)
            found = time.perf_counter()
            partition_temporal(gm, temporal=temporal)
            rows.append((captured - started, found - captured, time.perf_counter() - found))
        capture, find, partition = (statistics.median(column) for column in zip(*rows, strict=True))
        table.add_row(
            str(count),
            str(len(temporal.features)),
            f"{capture:.1f}",
            f"{find:.3f}",
            f"{partition:.3f}",
            f"{(find + partition) / count * 1e6:.0f}",
        )
    return table


def real_size(name: str) -> dict[str, float]:
    """Measure capture and partition of a network of published size, with random weights in real memory.

    Run this in its own process: the peak memory of a process never falls.
    """
    entry = next(e for e in ZOO if e.name == name)
    with torch.device("meta"):
        network = entry.build(True)
    network = network.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
    # 16x16 latents give the same graph as 64x64, and the forward that checks equality takes only seconds.
    inputs = pytree.tree_map(
        lambda x: x[..., :16, :16] if isinstance(x, Tensor) and x.dim() == 4 else x, entry.inputs(True)
    )
    with torch.no_grad():
        expected = pytree.tree_leaves(network(**inputs))[0]
    loaded = _peak()
    started = time.perf_counter()
    gm = tfmq_fx.capture(network, inputs)
    captured = time.perf_counter()
    nodes = len(gm.graph.nodes)
    temporal = find_temporal(gm)
    partition_temporal(gm, temporal=temporal)
    passed = time.perf_counter()
    peak = _peak()
    given = {n: x for n, (_, x) in leaves(inputs).items()}
    with torch.no_grad():
        got = pytree.tree_leaves(gm(*[given[n] for n in placeholders(gm)]))[0]
    return {
        "weights": sum(p.numel() * p.element_size() for p in network.parameters()) / 2**30,
        "loaded": loaded,
        "peak": peak,
        "nodes": nodes,
        "features": len(temporal.features),
        "capture": captured - started,
        "pass": passed - captured,
        "equal": float(torch.equal(got, expected)),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    console = Console(width=130)
    console.print(synthetic())
    table = Table(
        "network",
        "weights GiB",
        "process with the model GiB",
        "peak GiB",
        "ratio",
        "nodes",
        "features",
        "capture s",
        "pass s",
        "bitwise",
    )
    for name in MODELS:
        script = f"import json; from benchmarks.capture_scale import real_size; print(json.dumps(real_size({name!r})))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        r = json.loads(done.stdout.splitlines()[-1])
        table.add_row(
            name,
            f"{r['weights']:.2f}",
            f"{r['loaded']:.2f}",
            f"{r['peak']:.2f}",
            f"{r['peak'] / r['loaded']:.3f}",
            f"{r['nodes']:.0f}",
            f"{r['features']:.0f}",
            f"{r['capture']:.1f}",
            f"{r['pass']:.2f}",
            "yes" if r["equal"] else "NO",
        )
    console.print(table)
    print(
        f"medians of {REPEATS}; torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
