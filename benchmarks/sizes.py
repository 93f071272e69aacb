"""How large is a network on disk, in memory and while it runs: float32, w8a8, w4a8, and w4a8 packed?

    python -m benchmarks.sizes                 DDPM CIFAR-10, published size, random weights, engine "torch"
    python -m benchmarks.sizes --network dit --reduced

Each row has its own process, which only loads the file and calls the network. `tensors` is the size of its
weights. `process` is the memory resident after the first call, minus what the same process held after
importing torch and tfmq_fx, before it had a network. `peak` is the highest during three calls, minus the
same. Weights are rounded to nearest: sizes do not depend on the rounding method.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import tfmq_fx
from benchmarks.inference_speed import batch_of
from benchmarks.networks.zoo import ZOO, Entry
from tfmq_fx.runtimes.torch_engine import weight_bytes

# Row -> recipe and settings of lowering. If None, the network computes with quantize/dequantize pairs.
ROWS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "float32": ("", None),
    "w8a8, not lowered": ("w8a8", None),
    "w8a8": ("w8a8", {"pack": None}),
    "w4a8": ("w4a8", {"pack": None}),
    'w4a8, pack="int4"': ("w4a8", {"pack": "int4"}),
}


def resident() -> int:
    """Return the bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    """Reset the kernel's record of this process's peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the most bytes that this process held since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def held(tensors: Iterable[Tensor]) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def entry_of(name: str) -> Entry:
    return {e.name: e for e in ZOO}[name]


def child(given: argparse.Namespace) -> None:
    """Load one row's network from its files, call it, and print the measurements as a line of JSON."""
    torch.set_num_threads(1)
    published = not given.reduced
    inputs = batch_of(entry_of(given.network), published=published, size=given.batch)
    recipe, lowering = ROWS[given.child]
    folder = Path(given.folder)
    before, found = resident(), {}
    step: Callable[[], Any]
    if not recipe:
        # Building a reduced network reads its random values, which meta tensors do not have.
        with torch.device("meta" if published else "cpu"):
            network = entry_of(given.network).build(published)
        network.load_state_dict(load_file(folder / "float32.safetensors"), assign=True)
        found["tensors"] = held(network.parameters())
        step = lambda: network(**inputs)  # noqa: E731
    else:
        q = tfmq_fx.load(folder / recipe)
        if lowering is None:
            found["tensors"] = held(q.network.state_dict().values())
            step = lambda: q(**inputs)  # noqa: E731
        else:
            low = q.lower(
                "cpu", engine="torch", batch=given.batch, compile=False, precision="float32", **lowering
            )
            del q  # free its integers
            found["tensors"] = weight_bytes(low.network.gm)
            step = lambda: low(**inputs)  # noqa: E731
    with torch.no_grad():
        step()
        gc.collect()
        found["process"] = resident() - before
        reset_peak()
        seconds = []
        for _ in range(given.rounds):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    print(json.dumps({**found, "peak": peak() - before, "ms": 1e3 * statistics.median(seconds)}))


def write(given: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Write the files of every row, and return their sizes in bytes."""
    entry = entry_of(given.network)
    torch.manual_seed(0)
    network = entry.build(not given.reduced)
    folder.mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / "float32.safetensors")
    sizes = {"": (folder / "float32.safetensors").stat().st_size}
    inputs = batch_of(entry, published=not given.reduced, size=2)
    data = tfmq_fx.CalibrationSet.from_tensors({n: x for n, x in inputs.items() if isinstance(x, Tensor)})
    for bits in sorted({recipe for recipe, _ in ROWS.values() if recipe}):
        recipe = dataclasses.replace(
            tfmq_fx.Recipe.preset(bits),
            activation_observer="minmax",
            reconstruction=tfmq_fx.Reconstruction(method="nearest"),
        )
        if not (folder / bits).is_dir():
            q = tfmq_fx.quantize(network, recipe, calibration=data, timesteps=inputs["timestep"].unique())
            q.save_pretrained(folder / bits)
        sizes[bits] = sum(f.stat().st_size for f in (folder / bits).iterdir())
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="ddpm-cifar10", help="a name of the zoo")
    parser.add_argument("--reduced", action="store_true", help="the zoo's reduced size")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="keep the files in this folder, and use those that it has")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    if given.child:
        child(given)
        return
    table = Table("weights", "file MB", "tensors MB", "process MB", "peak MB", "ms a step")
    with ExitStack() as stack:
        name = given.folder or stack.enter_context(tempfile.TemporaryDirectory())
        files = write(given, Path(name))
        for row, (recipe, _) in ROWS.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.sizes",
                *sys.argv[1:],
                "--child",
                row,
                "--folder",
                name,
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise SystemExit(f"{row}: {run.stderr.strip()[-2000:]}")
            found = json.loads(run.stdout.strip().splitlines()[-1])
            print(f"{row}: {found}", flush=True)
            megabytes = [f"{found[k] / 1e6:.1f}" for k in ("tensors", "process", "peak")]
            table.add_row(row, f"{files[recipe] / 1e6:.1f}", *megabytes, f"{found['ms']:.0f}")
    print(
        f"{given.network}{', reduced' if given.reduced else ''}, batch {given.batch}, one thread, not compiled"
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
