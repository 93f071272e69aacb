"""Does w4a8 reconstruction fit, and how long would it take, at real size?

    python -m benchmarks.real_size            an SD-1.5-size UNet (860 M random weights), a few rows of random latents
    python -m benchmarks.real_size --spill    12,800 calibration rows of the digits model, streams past 1 GiB on disk

The first runs every stage of the default recipe to its end on few rows and few iterations, and scales what it measured
to the full calibration set: a block costs its forward passes (one row through a learning step counts three).
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import resource
import time
from typing import Any

import torch

import tfmq_fx
from tfmq_fx import spill
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.recipe import Recipe

FULL_ROWS, STEPS = 12_800, 50


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def recipe(**changes: Any) -> Recipe:
    base = Recipe.preset("w4a8")
    return dataclasses.replace(base, reconstruction=dataclasses.replace(base.reconstruction, **changes))


def real_size(rows: int, iterations: int, batch_size: int) -> None:
    from tests.zoo import ZOO

    torch.manual_seed(0)
    entry = next(e for e in ZOO if e.name == "sd-1.5")
    network = entry.build(True)
    example = {n: x for n, x in entry.inputs(True).items() if isinstance(x, torch.Tensor)}
    tensors = {n: torch.randn(rows, *x.shape[1:]) for n, x in example.items() if n != "timestep"}
    timesteps = torch.linspace(999, 1, STEPS).long()
    tensors["timestep"] = timesteps[torch.arange(rows) * STEPS // rows]
    chosen = recipe(iterations=iterations, batch_size=batch_size, num_samples=rows, max_memory=6.0)
    started = time.monotonic()
    q = tfmq_fx.quantize(
        network, chosen, calibration=tfmq_fx.CalibrationSet.from_tensors(tensors), timesteps=timesteps
    )
    report, settings = q.report, Recipe.preset("w4a8").reconstruction
    cpu = report["cpu_seconds"]
    print(f"ran to its end in {time.monotonic() - started:.0f} s, peak {peak_gib():.1f} GiB")
    print("CPU seconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in cpu.items()))
    blocks = report["reconstruction"]
    # Blocks know their wall time alone; their share of it is their share of the CPU's.
    of_wall = cpu["reconstruct"] / report["seconds"]["reconstruct"]
    temporal = blocks[0]["seconds"] * of_wall
    learning = sum(b["seconds"] for b in blocks[1:]) * of_wall
    walking = cpu["reconstruct"] - temporal - learning
    # A block's error is measured three times over all rows; a learning step is a forward and a backward pass.
    row_forwards = 3 * rows + 3 * iterations * batch_size
    full = 3 * settings.num_samples + 3 * settings.iterations * settings.batch_size
    hours = (
        cpu["capture"]
        + cpu["prepare"]
        + cpu["calibrate"] / rows * FULL_ROWS
        + temporal
        + learning / row_forwards * full
        + walking / rows * settings.num_samples
    ) / 3600
    print(
        f"{len(blocks)} blocks; CPU seconds: temporal block {temporal:.0f}, learning {learning:.0f}, walk {walking:.0f}"
    )
    print(
        f"estimate for the default recipe ({settings.num_samples} rows, {settings.iterations} iterations of "
        f"{settings.batch_size}) and {FULL_ROWS} calibration rows: {hours:.0f} CPU hours a model, of cores like these"
    )
    for note in report["notes"]:
        if note["name"] == "tuning":
            print(f"tuning {note['reason']}")
    print(
        f"{report['sizes']['float_bytes'] / 2**30:.2f} GiB float -> {report['sizes']['quantized_bytes'] / 2**30:.2f} GiB; "
        f"{report['sizes']['quantized_weights'] / 1e6:.0f} M quantized weights; rows {rows}, iterations {iterations}"
    )


def spilled(rows: int, iterations: int, limit: float) -> None:
    pipe = embedded_pipeline()
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.linspace(999, 1, STEPS).long()
    data = tfmq_fx.CalibrationSet.from_tensors(
        {
            "sample": torch.randn(rows, 1, 16, 16, generator=generator),
            "timestep": timesteps.repeat(-(-rows // STEPS))[:rows],
        }
    )
    gm = tfmq_fx.capture(pipe.unet, data.arguments(slice(0, 2)) | {"return_dict": False})
    prepared = tfmq_fx.prepare(gm, recipe(), timesteps=timesteps)
    tfmq_fx.calibrate(prepared, data.spread(512))
    before, written = peak_gib(), [0]
    write = spill.Budget.spill

    def counting(self: spill.Budget, x: torch.Tensor) -> Any:
        found = write(self, x)
        written[0] = max(written[0], self.spilled)
        return found

    spill.Budget.spill = counting  # type: ignore[method-assign]
    changes = {
        "num_samples": rows,
        "max_memory": limit,
        "iterations": iterations,
        "tune_iterations": iterations,
    }
    settings = recipe(**changes).reconstruction
    started = time.monotonic()
    tfmq_fx.reconstruct(prepared, data, settings)
    print(
        f"{rows} rows, max_memory {limit:g} GiB: {written[0] / 2**30:.1f} GiB written to disk, peak {peak_gib():.2f} GiB "
        f"({before:.2f} GiB before reconstruction), {time.monotonic() - started:.0f} s at {iterations} iterations a block"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spill", action="store_true")
    parser.add_argument("--rows", type=int, help="calibration rows (4; with --spill 12,800)")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-memory", type=float, default=1.0, help="GiB of streams, with --spill")
    args = parser.parse_args()
    if args.spill:
        spilled(args.rows or FULL_ROWS, args.iterations, args.max_memory)
    else:
        real_size(args.rows or 4, args.iterations, args.batch_size)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
