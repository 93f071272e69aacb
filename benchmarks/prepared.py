"""Prepare a network for a GPU where there is none, and keep it without its weights: a short time on a GPU then only measures.

    python -m benchmarks.prepared sd-xl w8a8 FILE                      quantizes by rounding to nearest, an hour of CPU time
    python -m benchmarks.prepared sd-xl w8a8 FILE --artefact OTHER     takes what was quantized and saved before

`python -m benchmarks.cuda_speed --parts sd-xl --prepared w8a8=FILE` measures it. FILE holds the graph with its kernels and the
small tensors, some MB; of the others the shapes, to draw them again: the time of a product hardly depends on its numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import tfmq_fx
from benchmarks import cuda_speed
from benchmarks.networks.zoo import ZOO
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.outside import to_device
from tfmq_fx.graph.nodes import attribute, set_buffer
from tfmq_fx.runtimes import cuda_engine

SMALL = 2048  # numbers: what is larger is drawn again


def write(gm: GraphModule, file: Path) -> None:
    """Write a prepared graph without its large tensors."""
    means: dict[str, float] = {}
    for name, x in tensors_of(gm).items():
        small = x.numel() <= SMALL
        means |= {} if small else {name: float(x.float().mean()) if x.is_floating_point() else 0.0}
        set_buffer(gm, name, x.detach().cpu().clone() if small else torch.empty_like(x, device="meta"))
    for node in gm.graph.nodes:
        node.meta = {}
    gm.meta = {}
    torch.save({"graph": gm, "means": means}, file)


def read(file: Path, device: torch.device) -> GraphModule:
    """Return a prepared graph on a device: its large integers are drawn, its large vectors of floats are their means.

    The file is a pickle: read none that others wrote.
    """
    found = torch.load(file, weights_only=False)
    gm: GraphModule = found["graph"]
    generator = torch.Generator(device).manual_seed(0)
    for name, mean in found["means"].items():
        like = attribute(gm, name)
        if like.dtype in (torch.int8, torch.uint8):
            low, high = (-100, 101) if like.dtype == torch.int8 else (0, 256)
            x = torch.randint(low, high, like.shape, dtype=like.dtype, device=device, generator=generator)
        else:
            x = torch.full(like.shape, mean, dtype=like.dtype, device=device)
        set_buffer(gm, name, x)
    to_device(gm, device)
    return gm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=[e.name for e in ZOO])
    parser.add_argument("recipe")
    parser.add_argument("file", type=Path)
    parser.add_argument("--artefact", type=Path)
    parser.add_argument("--pack", choices=["int4"])
    given = parser.parse_args()
    if given.artefact:
        q: Any = tfmq_fx.load(given.artefact)
    else:
        entry = next(e for e in ZOO if e.name == given.network)
        torch.manual_seed(0)
        q = cuda_speed.quantized(entry.build(True).requires_grad_(False), entry.inputs(True), given.recipe)
    prepared = cuda_engine.prepare_graph(q, precision="bfloat16", pack=given.pack, device=torch.device("cpu"))
    write(prepared.gm, given.file)


if __name__ == "__main__":
    main()
