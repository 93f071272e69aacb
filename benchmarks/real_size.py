"""Does w4a8 reconstruction fit, and how long would it take, at real size?

    python -m benchmarks.real_size            an SD-1.5-size UNet (860 M random weights), a few rows of random
                                              latents, by each method: nearest, gptq, and the default; on the CPU,
                                              and on a GPU where there is one
    python -m benchmarks.real_size --method gptq --device cuda
    python -m benchmarks.real_size --spill    12,800 calibration rows with SD-1.5's text tokens for a narrow
                                              UNet, mapped from files; streams beyond 1 GiB go to disk

The first command runs every stage on few rows and few iterations, each method on each device in a process of its own, and
extrapolates the cost to the full calibration set (seconds of CPU, on a GPU those of the clock): a block costs its forward passes, and
a row in a learning step counts as three of them. GPTQ's solving costs the same for any number of rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import tfmq_fx
from benchmarks.memory import OwnMemory, anonymous
from benchmarks.recipes import rounded
from tfmq_fx.calibration.effects import ROWS
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.recipe import Recipe, Reconstruction
from tfmq_fx.reconstruction import rounding, spill

FULL_ROWS, STEPS = 12_800, 50
METHODS = ("nearest", "gptq", "default")
SPENT = {"cpu": "cpu_seconds", "cuda": "seconds"}  # what a stage takes of a device, in the report


def recipe(**changes: Any) -> Recipe:
    return rounded(Recipe.preset("w4a8"), **changes)


@contextmanager
def timed_solving() -> Iterator[list[float]]:
    """Yield a list that gets the seconds of every step of GPTQ whose cost does not depend on the rows."""
    seconds: list[float] = []
    own = {name: getattr(rounding, name) for name in ("gptq", "corrected")}

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - started)

        return call

    for name, function in own.items():
        setattr(rounding, name, timed(function))
    try:
        yield seconds
    finally:
        for name, function in own.items():
            setattr(rounding, name, function)


def real_size(method: str, rows: int, iterations: int, batch_size: int, *, small: bool, device: str) -> None:
    from benchmarks.networks.zoo import ZOO

    torch.manual_seed(0)
    entry = next(e for e in ZOO if e.name == "sd-1.5")
    network = entry.build(not small).to(device)
    example = {n: x for n, x in entry.inputs(not small).items() if isinstance(x, torch.Tensor)}
    tensors = {n: torch.randn(rows, *x.shape[1:]) for n, x in example.items() if n != "timestep"}
    timesteps = torch.linspace(999, 1, STEPS).long()
    tensors["timestep"] = timesteps[torch.arange(rows) * STEPS // rows]
    changes: dict[str, Any] = {} if method == "default" else {"method": method, "tune_iterations": 0}
    chosen = recipe(
        iterations=iterations,
        batch_size=batch_size,
        num_samples=rows,
        max_memory=6.0,
        gptq_memory=2.0,
        **changes,
    )
    before, started = anonymous(), time.monotonic()
    data = tfmq_fx.CalibrationSet.from_tensors(tensors)
    with OwnMemory() as memory, timed_solving() as solving:
        q = tfmq_fx.quantize(network, chosen, calibration=data, timesteps=timesteps)
    sizes, spent = q.report["sizes"], q.report[SPENT[device]]
    print(
        f"{method} on {device}: ran to its end in {time.monotonic() - started:.0f} s, rows {rows}, iterations {iterations}; peak of its own "
        f"memory {memory.anonymous:.1f} GiB, {before:.1f} of them before it started; "
        f"{sizes['float_bytes'] / 2**30:.2f} GiB float -> {sizes['quantized_bytes'] / 2**30:.2f}"
    )
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"peak memory of the GPU ({torch.cuda.get_device_name()}) {peak:.1f} GiB")
    kind = SPENT[device].replace("_", " ")
    print(f"{kind}: " + ", ".join(f"{stage} {s:.0f}" for stage, s in spent.items()))
    print(
        f"estimate for {FULL_ROWS} calibration rows and the recipe's own settings: "
        f"{hours(q.report, spent, chosen.reconstruction, rows, sum(solving)):.1f} hours ({kind}) a model, on a machine like this"
    )
    for note in q.report["notes"]:
        if note["name"] == "tuning":
            print(f"tuning {note['reason']}")


def hours(
    report: dict[str, Any], spent: dict[str, float], ran: Reconstruction, rows: int, solving: float
) -> float:
    """Return the hours of a whole quantization by the preset's numbers of rows and iterations.

    report, spent, ran, rows: of the run with few; seconds by stage. solving: its seconds of GPTQ that do not depend on the rows.
    """
    blocks, settings = report["reconstruction"], Recipe.preset("w4a8").reconstruction
    calibrated = {"calibrate": FULL_ROWS, "measure": STEPS, "choose": ROWS}  # of so many rows, others of none
    fixed = sum(
        s * max(1, calibrated.get(stage, rows) / rows) for stage, s in spent.items() if stage != "reconstruct"
    )
    if not blocks:
        return fixed / 3600
    samples = dataclasses.replace(settings, method=ran.method).block_samples
    # Blocks record only wall time. Assume that a block's share of it is its share of the time spent.
    of_wall = spent["reconstruct"] / report["seconds"]["reconstruct"]
    temporal = sum(b["seconds"] for b in blocks if b["name"] == "temporal_block") * of_wall
    learning = sum(b["seconds"] for b in blocks) * of_wall - temporal
    walking = spent["reconstruct"] - temporal - learning
    if "adaround" in ran.method:
        # A block's error is measured three times over all rows. A learning step is a forward and a backward pass.
        row_forwards = 3 * rows + 3 * ran.iterations * ran.batch_size
        full = 3 * samples + 3 * settings.iterations * settings.batch_size
        learning *= full / row_forwards
    else:  # an upper bound: the Hessians of wide pictures take gptq_rows positions only
        constant = min(solving * of_wall, learning)
        learning = constant + (learning - constant) / rows * samples
    return float(fixed + temporal + learning + walking / rows * samples) / 3600


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
        before, started = anonymous(), time.monotonic()
        with OwnMemory() as memory:
            tfmq_fx.reconstruct(prepared, data, settings)
    last = state_of(prepared).reconstruction[-1]
    mapped = sum(x.nbytes for x in tensors.values()) / 2**30
    print(
        f"{rows} rows of {mapped:.1f} GiB in mapped files, max_memory {limit:g} GiB: {written[0] / 2**30:.1f} GiB written to "
        f"disk, peak of the process's own memory {memory.anonymous:.2f} GiB ({before:.2f} GiB before reconstruction), "
        f"{time.monotonic() - started:.0f} s at {iterations} iterations a block and {tune_iterations} of tuning; "
        f"last, {last.name}: {last.kept}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spill", action="store_true")
    parser.add_argument("--method", choices=METHODS, help="one of them, in this process")
    parser.add_argument("--device", choices=SPENT, default="cpu", help="with --method")
    parser.add_argument(
        "--small", action="store_true", help="the same blocks with few channels: does this script run?"
    )
    parser.add_argument("--rows", type=int, help="calibration rows (4; with --spill 12,800)")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--tune-iterations", type=int, default=100, help="with --spill")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-memory", type=float, default=1.0, help="GiB of streams, with --spill")
    args = parser.parse_args()
    if args.spill:
        spilled(args.rows or FULL_ROWS, args.iterations, args.tune_iterations, args.max_memory)
    elif args.method:
        real_size(
            args.method,
            args.rows or 4,
            args.iterations,
            args.batch_size,
            small=args.small,
            device=args.device,
        )
    else:
        for method, device in itertools.product(METHODS, SPENT if torch.cuda.is_available() else ("cpu",)):
            more = ["--method", method, "--device", device]
            subprocess.run([sys.executable, "-m", "benchmarks.real_size", *sys.argv[1:], *more], check=True)
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
