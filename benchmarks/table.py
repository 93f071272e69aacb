"""Print the papers' table for each trained model: plain rounding to nearest and the preset at each setting.

    make table

First makes the runs that benchmarks/reconstruction.jsonl lacks (by benchmarks/reconstruction.py, each in its
own process). Plain: weights rounded to nearest, and nothing chosen by the network. PSNR is to the float network's
samples of the same noise: mean and median of images, and pooled over all pixels. FD is the Frechet distance to them;
its floor is that of float samples of different noise. "good" is the percentage recognised as a digit, or as
the shape asked for. Values are mean and standard deviation over seeds, each of which draws its own
calibration trajectories.
"""

from __future__ import annotations

import argparse
import platform
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reconstruction import RESULTS, TRAJECTORIES, Run, in_a_process, read, run_all, spread
from benchmarks.zoo.models import MODELS
from tfmq_fx.choices import is_open
from tfmq_fx.recipe import Recipe

SETTINGS = ("w8a8", "w4a8", "w4a4", "w8a16", "w4a16")
PLAIN = "nearest"


def ours(setting: str) -> str:
    recipe = Recipe.preset(setting)
    return recipe.reconstruction.method + (",chosen" if is_open(recipe) else "")


def over_seeds(
    found: dict[Run, dict[str, float]], model: str, setting: str, method: str, samples: int
) -> list[dict[str, float]]:
    """Return the figures of the runs that differ in their seed alone."""
    of = model, setting, method, samples
    return [f for r, f in found.items() if (r.model, r.setting, r.method, r.samples) == of]


def table(found: dict[Run, dict[str, float]], samples: int) -> Table:
    shown = Table(
        "model", "bits", "PSNR dB\nplain", "pooled\nplain", "PSNR dB\nours", "median\nours", "pooled\nours", "FD\nplain",
        "FD\nours", "FD\nfloor", "good %\nplain", "good %\nours", "MB\nours", "CPU s\nplain", "CPU s\nours",
    )  # fmt: skip
    for model, setting in product(MODELS, SETTINGS):
        plain, chosen = (
            over_seeds(found, model, setting, method, samples) for method in (PLAIN, ours(setting))
        )
        if plain and chosen:
            shown.add_row(
                model, setting,
                spread(plain, "psnr", ".1f"), spread(plain, "psnr_pooled", ".1f"),
                *(spread(chosen, key, ".1f") for key in ("psnr", "psnr_median", "psnr_pooled")),
                *(spread(rows, "frechet", ".4f") for rows in (plain, chosen)), f"{plain[0]['frechet_floor']:.4f}",
                *(spread(rows, "recognised", ".1f") for rows in (plain, chosen)), f"{chosen[0]['megabytes']:.2f}",
                *(spread(rows, "cpu_seconds", ".0f") for rows in (plain, chosen)),
            )  # fmt: skip
    return shown


def every_method(found: dict[Run, dict[str, float]], samples: int, seeds: int) -> Table:
    """Return both figures of every method that was measured with so many seeds."""
    shown = Table("model", "bits", "method", "PSNR dB, mean of images", "pooled", "CPU s", "MB")
    kinds = sorted(
        {
            (list(MODELS).index(r.model), SETTINGS.index(r.setting), r.method)
            for r in found
            if r.setting in SETTINGS
        }
    )
    for model, setting, method in kinds:
        names = list(MODELS)[model], SETTINGS[setting], method
        of = over_seeds(found, *names, samples)
        if len(of) >= seeds and all("psnr_pooled" in f for f in of):
            figures = (
                spread(of, n, form)
                for n, form in (("psnr", ".1f"), ("psnr_pooled", ".1f"), ("cpu_seconds", ".0f"))
            )
            shown.add_row(*names, *figures, f"{of[0]['megabytes']:.2f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/reconstruction"))
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--every-method",
        action="store_true",
        help="print both figures of what was measured, and measure nothing",
    )
    args = parser.parse_args()
    console = Console(width=190)
    if args.every_method:
        console.print(every_method(read(RESULTS), args.samples, args.seeds))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(model, setting, method, seed, args.samples)
        for seed in range(args.seeds)
        for model in args.models
        for setting in args.settings
        for method in (PLAIN, ours(setting))
    ]
    run_all(runs, results=RESULTS, figures=partial(in_a_process, output=args.output))
    console.print(table(read(RESULTS), args.samples))
    console.print(
        f"{args.samples} samples, 50 steps (flow: 20), {TRAJECTORIES} calibration trajectories; torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads",
        highlight=False,
    )


if __name__ == "__main__":
    main()
