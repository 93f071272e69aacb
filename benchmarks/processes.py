"""Do two threads or two processes speed up one reconstruction, and are the integers the same?

    python -m benchmarks.processes

Quantizes the embedded model at w4a8 with 256 calibration rows and 100 iterations per block: by one process on
one thread, on two threads, and by two processes (gloo) of one thread each. The runs take turns; the medians
are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import tfmq_fx
from tfmq_fx.base.files import raw_bytes
from tfmq_fx.base.parallel import joined
from tfmq_fx.demo import embedded_pipeline

ROWS, ITERATIONS = 256, 100
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def work(threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with joined() as ranks:
        pipe = embedded_pipeline()
        generator = torch.Generator().manual_seed(0)
        timesteps = torch.linspace(999, 1, 50).long()
        rows = {
            "sample": torch.randn(ROWS, 1, 16, 16, generator=generator),
            "timestep": timesteps[torch.arange(ROWS) % 50],
        }
        data = tfmq_fx.CalibrationSet.from_tensors(rows)
        recipe = tfmq_fx.Recipe()
        settings = dataclasses.replace(recipe.reconstruction, iterations=ITERATIONS, tune_iterations=0)
        gm = tfmq_fx.capture(pipe.unet, data.arguments(slice(0, 2)) | {"return_dict": False})
        gm = tfmq_fx.prepare(gm, dataclasses.replace(recipe, reconstruction=settings), timesteps=timesteps)
        seconds = {}
        for name, stage in (("calibrate", tfmq_fx.calibrate), ("reconstruct", tfmq_fx.reconstruct)):
            if ranks.size > 1:
                dist.barrier()
            started = time.perf_counter()
            stage(gm, data)
            seconds[name] = time.perf_counter() - started
    digest = hashlib.sha256()
    for _, x in sorted(tfmq_fx.convert(gm).state_dict().items()):
        digest.update(raw_bytes(x))
    return {**seconds, "integers": digest.hexdigest()[:12]}


def measure(processes: int, threads: int) -> list[dict[str, Any]]:
    """Start the processes as torchrun would, and return the result of each."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.processes", "--work", str(threads)]
    started = []
    for rank in range(processes):
        group = {
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29517",
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} | (group if processes > 1 else {})
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )
    return [json.loads(p.communicate()[0]) for p in started]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(args.repeats):
        for name, way in WAYS.items():
            found[name] += measure(*way)
    base = statistics.median(f["reconstruct"] for f in found["1 process, 1 thread"])
    for name, rows in found.items():
        seconds = {s: statistics.median(r[s] for r in rows) for s in ("calibrate", "reconstruct")}
        print(
            f"{name:28} calibrate {seconds['calibrate']:5.1f} s, reconstruct {seconds['reconstruct']:5.1f} s "
            f"({base / seconds['reconstruct']:.2f}x), integers {', '.join(sorted({r['integers'] for r in rows}))}"
        )
    print(
        f"{ROWS} rows, {ITERATIONS} iterations a block, medians of {args.repeats}; torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
