"""How much memory does quantizing a network take that lies in a file of its own size?

    python -m benchmarks.larger_than_memory sd-xl --method gptq
    python -m benchmarks.larger_than_memory flux --method nearest --folder /large/disk
    python -m benchmarks.larger_than_memory flux --method gptq --execution-device cuda

Writes random bfloat16 weights of the published shapes as a sharded diffusers folder, quantizes them to W4A8 with short
sequences, and calls the result once after loading it. Each step is a process of its own; it prints the peak of its own
memory (without the pages of mapped files that the kernel can drop), seconds and bytes on disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tfmq_fx
from benchmarks.memory import OwnMemory
from benchmarks.networks.zoo import ZOO
from tfmq_fx.base import arithmetic
from tfmq_fx.base.arguments import leaves, nested
from tfmq_fx.observers import weight
from tfmq_fx.recipe import PRESETS, Recipe, Reconstruction

NETWORKS = ("sd-1.5", "sd-xl", "flux")
SHARD = 2 * 2**30  # bytes
# What a short sequence keeps of the published inputs, by dimension; a dimension that is shorter stays.
SHORT = {
    "sample": (None, None, 8, 8),
    "encoder_hidden_states": (None, 16),
    "hidden_states": (None, 64),
    "img_ids": (64,),
    "txt_ids": (16,),
}
WITHOUT_ROWS = ("img_ids", "txt_ids")


def fast_products() -> Any:
    """Compute linear layers and convolutions in half precision by float32 kernels, one layer's weights at a time.

    On CPUs without bfloat16 instructions, torch's own kernels take up to 100 times as long. Returns what must be kept.
    """
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    aten, library = torch.ops.aten, torch.library.Library("aten", "IMPL")

    def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = x.float().flatten(0, -2) @ w.float().t()
        y = y if b is None else y.add_(b.float())
        return y.to(x.dtype).reshape(*x.shape[:-1], len(w))

    def conv2d(
        x: Tensor,
        w: Tensor,
        b: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        given = [x.float(), w.float(), None if b is None else b.float()]
        settings = [[v, v] if isinstance(v, int) else v for v in (stride, padding, dilation)]
        return aten.convolution.default(*given, *settings, False, [0, 0], groups).to(x.dtype)  # type: ignore[no-any-return]

    def linear_backward(
        x: Tensor, y: Tensor, w: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if mask[1] or mask[2]:
            raise NotImplementedError("only the gradient of the input is computed here")
        return (y.float().flatten(0, -2) @ w.float()).to(x.dtype).reshape(x.shape), None, None

    library.impl("linear", linear, "CPU")
    library.impl("linear_backward", linear_backward, "CPU")
    library.impl("conv2d", conv2d, "CPU")
    return library


def build(name: str, layers: float = 1.0) -> Any:
    """Return a network of the published size, or with a share of its layers, on the meta device."""
    entry = next(e for e in ZOO if e.name == name)
    with torch.device("meta"):
        network: Any = entry.build(True)
        counts = {n: x for n, x in network.config.items() if n in ("num_layers", "num_single_layers")}
        if layers < 1:
            fewer = {n: max(1, round(x * layers)) for n, x in counts.items()}
            network = type(network)(**{**network.config, **fewer}).eval()
    return network


def inputs(name: str) -> dict[str, tuple[tuple[str | int, ...], Tensor]]:
    """Return a network's inputs by flat name, with short sequences, each with its path among the arguments."""
    entry = next(e for e in ZOO if e.name == name)
    found = {}
    for flat, (path, x) in leaves(entry.inputs(True)).items():
        if isinstance(x, Tensor):
            sizes = SHORT.get(flat, ())
            x = x[tuple(slice(s) for s in sizes)].clone()
            found[flat] = path, x.bfloat16() if x.is_floating_point() and flat != "timestep" else x
    return found


def tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield random weights in bfloat16, scaled so that activations keep their size."""
    for name, p in network.state_dict().items():
        if p.dim() > 1:
            yield name, torch.empty(p.shape, dtype=torch.bfloat16).normal_(std=p[0].numel() ** -0.5)
        else:
            yield name, torch.full(p.shape, float(name.endswith("weight")), dtype=torch.bfloat16)


def write(network: Any, folder: Path) -> None:
    """Write a diffusers folder of random weights, one shard in memory at a time."""
    shards: list[tuple[str, list[str]]] = []
    held: dict[str, Tensor] = {}
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    def flush() -> None:
        file = f"diffusion_pytorch_model-{len(shards) + 1:05d}.safetensors"
        save_file(held, temporary / file, metadata={"format": "pt"})
        shards.append((file, list(held)))
        held.clear()

    for name, x in tensors(network):
        held[name] = x
        if sum(t.nbytes for t in held.values()) > SHARD:
            flush()
    flush()
    network.save_config(temporary)
    index = {"metadata": {}, "weight_map": {n: file for file, names in shards for n in names}}
    (temporary / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    temporary.rename(folder)


def quantize(
    name: str, source: Path, target: Path, method: str, rows: int, max_memory: float, device: str | None
) -> None:
    """Quantize the folder `source` to W4A8, and save it as `target`. device: computes, while the network stays on the CPU."""
    network = type(build(name)).from_pretrained(source, torch_dtype=torch.bfloat16).eval()
    found = inputs(name)
    data = {
        n: x.repeat(rows // 2, *[1] * (x.dim() - 1)) for n, (_, x) in found.items() if n not in WITHOUT_ROWS
    }
    constants: dict[str, Any] = {n: x for n, (_, x) in found.items() if n in WITHOUT_ROWS}
    paths = {n: path for n, (path, _) in found.items()}
    if method in PRESETS:
        recipe = Recipe.preset(method)
    else:
        recipe = Recipe(reconstruction=Reconstruction(method=method, tune_iterations=0))
    reconstruction = dataclasses.replace(
        recipe.reconstruction, max_memory=max_memory, gptq_memory=1.0, batch_size=2
    )
    recipe = dataclasses.replace(recipe, reconstruction=reconstruction)
    state = target.with_name(f"{target.name}-state")  # an interrupted run goes on from there
    q = tfmq_fx.quantize(
        network,
        recipe,
        calibration=tfmq_fx.CalibrationSet(data, constants, "timestep", paths),
        state=None if method == "nearest" else state,
        execution_device=device,
    )
    if device is not None:
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"peak memory of the GPU ({torch.cuda.get_device_name(device)}) {peak:.2f} GiB")
    print("seconds:", ", ".join(f"{stage} {s:.0f}" for stage, s in q.report["seconds"].items()))
    print(f"{q.report['sizes']['quantized_weights'] / 1e9:.2f} G quantized weights")
    started = time.monotonic()
    q.save_pretrained(target)
    shutil.rmtree(state, ignore_errors=True)
    print(f"save {time.monotonic() - started:.0f} s")


def call(name: str, target: Path, max_memory: float) -> None:
    """Load `target` and call it once."""
    started = time.monotonic()
    q = tfmq_fx.load(target, max_memory=max_memory)
    loaded = time.monotonic()
    arguments = nested(dict(inputs(name).values()))
    with torch.no_grad():
        output = q(**arguments, return_dict=False)[0]
    print(f"load {loaded - started:.0f} s, one call {time.monotonic() - loaded:.0f} s, {tuple(output.shape)}")
    if not output.isfinite().all():
        raise SystemExit("the output is not finite")


def size_of(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument(
        "--method", default="nearest", choices=("nearest", "gptq", "w4a8"), help="w4a8: the preset"
    )
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers of a transformer")
    parser.add_argument(
        "--candidates",
        type=int,
        default=80,
        help="of the range search of a weight: fewer take less time, and as much memory",
    )
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--max-memory", type=float, default=1.0, help="Reconstruction.max_memory, GiB")
    parser.add_argument("--execution-device", help="a GPU that computes, such as cuda:0")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "tfmq-larger-than-memory"
    )
    parser.add_argument(
        "--step", choices=("write", "quantize", "call"), help="one step alone, in this process"
    )
    args = parser.parse_args()
    source = args.folder / f"{args.network}-{args.layers:g}"
    target = args.folder / f"{args.network}-{args.layers:g}-{args.method}"
    if args.step is None:
        for step in ("write", "quantize", "call"):
            subprocess.run(
                [sys.executable, "-m", "benchmarks.larger_than_memory", *sys.argv[1:], "--step", step],
                check=True,
            )
        return
    weight.search_range = partial(arithmetic.search_range, steps=args.candidates)  # type: ignore[attr-defined]
    started, kept = time.monotonic(), fast_products()
    with OwnMemory() as memory:
        if args.step == "write":
            if not source.is_dir():
                write(build(args.network, args.layers), source)
        elif args.step == "quantize":
            quantize(
                args.network, source, target, args.method, args.rows, args.max_memory, args.execution_device
            )
        else:
            call(args.network, target, args.max_memory)
    del kept
    disk = size_of(target if args.step == "call" else source)
    parameters = sum(math.prod(p.shape) for p in build(args.network, args.layers).parameters())
    print(
        f"{args.step}: {parameters / 1e9:.2f} G parameters, {args.method}; own memory {memory.anonymous:.2f} GiB, with dirty "
        f"pages {memory.with_dirty:.2f}; {time.monotonic() - started:.0f} s; {disk:.2f} GiB on disk",
        flush=True,
    )


if __name__ == "__main__":
    main()
