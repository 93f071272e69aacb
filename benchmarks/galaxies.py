"""How close do samples of a trained network from outside stay over the 25 steps of a sampler?

    python -m benchmarks.galaxies                                          all networks and rows (minutes)
    python -m benchmarks.galaxies --networks hsc64 --rows w8a8 "w8a8 nearest"  some of them

The networks are those of benchmarks/networks/galaxies.py, trained and published by others; their wheel is
downloaded by name. Rows are recipes by the names of benchmarks/recipes.py, and "bf16", the float network in
bfloat16 autocast. PSNR is between 32 samples of the quantized and the float network from the same noise, in dB of
the float samples' range. Calibration is on the rows that 24 other samples give. CPU seconds are those of quantizing.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tfmq_fx
from benchmarks.networks.galaxies import NETWORKS, STEPS, Galaxies, noise, rows, trajectory
from benchmarks.recipes import named
from benchmarks.terrain import Call, bf16
from tfmq_fx.base.metrics import psnr, psnr_by_image
from tfmq_fx.recipe import Recipe

BF16 = "bf16"
ROWS = (BF16, "w8a8 plain", "w8a8 nearest", "w8a8", "w4a8", "w8a16", "w4a16")
CALIBRATION_SEED, NOISE_SEED = 1, 3


@dataclasses.dataclass
class Row:
    network: str
    name: str
    mean: float  # of the images' PSNR, as are median and lowest
    median: float
    pooled: float
    lowest: float
    megabytes: float | None = None
    cpu_seconds: float | None = None


def measure(network: str, name: str, samples: Tensor, reference: Tensor) -> Row:
    value_range = float(reference.max() - reference.min())
    by_image = psnr_by_image(samples, reference, value_range=value_range)
    return Row(
        network,
        name,
        mean=by_image.mean().item(),
        median=by_image.median().item(),
        pooled=psnr(samples, reference, value_range=value_range),
        lowest=by_image.min().item(),
    )


def contender(network: nn.Module, recipe: Recipe | None, data: tfmq_fx.CalibrationSet) -> Call:
    """Return what computes a row: the network quantized by the recipe, or for None in bfloat16 autocast."""
    if recipe is None:
        return bf16(network)
    return tfmq_fx.quantize(network, recipe, calibration=data, timestep="t", seed=0)


def run(
    name: str, recipes: dict[str, Recipe | None], *, samples: int, trajectories: int
) -> tuple[list[Row], Tensor]:
    """Return the rows of one network, and its float samples. name: of NETWORKS. recipes: by the row's name."""
    network = Galaxies(name).eval()
    first = noise(samples, network.size, seed=NOISE_SEED)
    reference = trajectory(network, first)[-1]
    given = rows(network, trajectories, seed=CALIBRATION_SEED)
    data = tfmq_fx.CalibrationSet.from_tensors(given, timestep="t")
    found = []
    for label, recipe in recipes.items():
        started = time.process_time()
        made = contender(network, recipe, data)
        seconds = time.process_time() - started
        row = measure(name, label, trajectory(made, first)[-1], reference)
        if isinstance(made, tfmq_fx.QuantizedModel):
            row.cpu_seconds = seconds
            row.megabytes = made.report["sizes"]["quantized_bytes"] / 1e6
        found.append(row)
        Console(stderr=True).print(row, highlight=False)
    return found, reference


def table(found: list[Row]) -> Table:
    shown = Table("network", "row", "PSNR dB: mean of images", "median", "pooled", "lowest", "MB", "CPU s")
    for row in found:
        figures = [f"{x:.1f}" for x in (row.mean, row.median, row.pooled, row.lowest)]
        megabytes = "" if row.megabytes is None else f"{row.megabytes:.2f}"
        seconds = "" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f}"
        shown.add_row(row.network, row.name, *figures, megabytes, seconds)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="bf16, or a recipe's name")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--trajectories", type=int, default=24, help="of the calibration set")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipes = {name: None if name == BF16 else named(name) for name in args.rows}
    found: list[Row] = []
    ranges = []
    for name in args.networks:
        its_rows, reference = run(name, recipes, samples=args.samples, trajectories=args.trajectories)
        found += its_rows
        ranges.append(f"{name} {reference.min():.2f} to {reference.max():.2f}")
    console = Console(width=120)
    console.print(table(found))
    console.print(
        f"{args.samples} samples, DDIM {STEPS} steps, {args.trajectories} calibration trajectories; values of the "
        f"float samples: {', '.join(ranges)}; {torch.cpu.get_capabilities()['cpu_name']}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
