"""Does w4a8 reconstruction fit, and how long would it take, at real size?

    python -m benchmarks.real_size            an SD-1.5-size UNet (860 M random weights), a few rows of random
                                              latents
    python -m benchmarks.real_size --spill    12,800 calibration rows with SD-1.5's text tokens for a narrow
                                              UNet, mapped from files; streams beyond 1 GiB go to disk

The first command runs every stage of the default recipe on few rows and few iterations, and extrapolates the
cost to the full calibration set: a block costs its forward passes, and a row in a learning step counts as
three of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

import tfmq_fx
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.recipe import Recipe
from tfmq_fx.reconstruction import spill

FULL_ROWS, STEPS = 12_800, 50


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def recipe(**changes: Any) -> Recipe:
    base = Recipe.preset("w4a8")
    return dataclasses.replace(base, reconstruction=dataclasses.replace(base.reconstruction, **changes))


def real_size(rows: int, iterations: int, batch_size: int) -> None:
    from benchmarks.networks.zoo import ZOO

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
    # Blocks record only wall time. Assume that a block's share of it is its share of the CPU time.
    of_wall = cpu["reconstruct"] / report["seconds"]["reconstruct"]
    temporal = blocks[0]["seconds"] * of_wall
    learning = sum(b["seconds"] for b in blocks[1:]) * of_wall
    walking = cpu["reconstruct"] - temporal - learning
    # A block's error is measured three times over all rows. A learning step is a forward and a backward pass.
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


class Anonymous:
    """The peak of a process's own memory in GiB.

    Resident size would include mapped files, which the kernel can drop.
    """

    def __init__(self) -> None:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Anonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) / 2**20


def narrow() -> tuple[torch.nn.Module, dict[str, tuple[int, ...]]]:
    """Return a narrow UNet with SD-1.5's kinds of blocks and text tokens, and the shapes of its input rows."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return network.eval(), {"sample": (4, 16, 16), "encoder_hidden_states": (77, 768)}


def spilled(rows: int, iterations: int, tune_iterations: int, limit: float) -> None:
    torch.manual_seed(0)
    network, shapes = narrow()
    timesteps = torch.linspace(999, 1, STEPS).long()
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"timestep": timesteps.repeat(-(-rows // STEPS))[:rows]}
        for name, shape in shapes.items():  # as CalibrationSet.record stores rows that exceed its memory
            file = f"{folder}/{name}"
            flat = torch.from_file(file, shared=True, size=rows * math.prod(shape), dtype=torch.float32)
            tensors[name] = flat.view(rows, *shape)
            for part in tensors[name].split(256):
                part.normal_()
        data = tfmq_fx.CalibrationSet.from_tensors(tensors)
        gm = tfmq_fx.capture(network, data.arguments(slice(0, 2)) | {"return_dict": False})
        prepared = tfmq_fx.prepare(gm, recipe(), timesteps=timesteps)
        tfmq_fx.calibrate(prepared, data.spread(512))
        written = [0]
        write = spill.Budget.spill

        def counting(self: spill.Budget, x: torch.Tensor) -> Any:
            found = write(self, x)
            written[0] = max(written[0], self.spilled)
            return found

        spill.Budget.spill = counting  # type: ignore[method-assign]
        settings = recipe(
            num_samples=rows, max_memory=limit, iterations=iterations, tune_iterations=tune_iterations
        ).reconstruction
        before, started = Anonymous.now(), time.monotonic()
        with Anonymous() as memory:
            tfmq_fx.reconstruct(prepared, data, settings)
    last = state_of(prepared).reconstruction[-1]
    mapped = sum(x.nbytes for x in tensors.values()) / 2**30
    print(
        f"{rows} rows of {mapped:.1f} GiB in mapped files, max_memory {limit:g} GiB: {written[0] / 2**30:.1f} GiB written to "
        f"disk, peak of the process's own memory {memory.peak:.2f} GiB ({before:.2f} GiB before reconstruction), "
        f"{time.monotonic() - started:.0f} s at {iterations} iterations a block and {tune_iterations} of tuning; "
        f"last, {last.name}: {last.kept}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spill", action="store_true")
    parser.add_argument("--rows", type=int, help="calibration rows (4; with --spill 12,800)")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--tune-iterations", type=int, default=100, help="with --spill")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-memory", type=float, default=1.0, help="GiB of streams, with --spill")
    args = parser.parse_args()
    if args.spill:
        spilled(args.rows or FULL_ROWS, args.iterations, args.tune_iterations, args.max_memory)
    else:
        real_size(args.rows or 4, args.iterations, args.batch_size)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
