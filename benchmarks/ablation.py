"""Do the papers' ideas for the temporal block hold on our models?

    python -m benchmarks.ablation --output out/ablation
    python -m benchmarks.ablation --output out/ablation --observers    compares the range estimators of FSC instead

    none        the block's weights rounded to nearest, one static scale for each of its activations
    TIAR        the block's rounding chosen over all timesteps at once (TFMQ-DM, section 4.2), by the
                library's second-order step, whose error ends below that of the papers' learned rounding
                (docs/measured/reconstruction.md)
    FSC         activation scales per timestep (TFMQ-DM, section 4.3)
    TIAR+FSC    both: the library's default
    cache       the block's features from a table (Temporal Feature Matters)
    auto        for each feature, the cheaper of TIAR+FSC and a table whose disturbance is within bounds
                (same paper)

All variants quantize the rest of the network in the same way, by `--rest`. There are five seeds, each with
its own calibration trajectories. Quantized and float samples start from the same noise. The value after ± is
the 95% confidence interval of the mean, by Student's t. "gain" is the PSNR minus that of "none" with the same
seed, which cancels what the runs of a seed have in common. Runs are kept in benchmarks/ablation.jsonl, as in
benchmarks.reconstruction.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import tfmq_fx
from benchmarks.reconstruction import Run, measure, prepare, read, run_all
from benchmarks.zoo.models import MODELS
from tfmq_fx.base.metrics import cosine_distance
from tfmq_fx.calibration.pipelines import denoiser
from tfmq_fx.calibration.temporal_rows import chunks_of, run_temporal, temporal_rows
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.observers import TemporalMinMaxObserver, TemporalObserver
from tfmq_fx.passes.quantize.observed import observers, set_mode, without_observers
from tfmq_fx.passes.quantize.state import temporal_of
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal
from tfmq_fx.recipe import TEMPORAL_OBSERVERS, Recipe

RESULTS = Path(__file__).with_suffix(".jsonl")
SETTINGS = ("w8a8", "w4a8", "w4a4")
TRAJECTORIES = 16  # calibration trajectories: 800 rows
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class StaticObserver(TemporalMinMaxObserver):
    """An observer with one range for all timesteps: the baseline of finite set calibration."""

    def ranges(self) -> tuple[Tensor, Tensor]:
        low_T, high_T = super().ranges()
        return low_T.amin().expand_as(low_T), high_T.amax().expand_as(high_T)


VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"temporal_method": "nearest", "temporal_observer": StaticObserver},
    "TIAR": {"temporal_method": "gptq", "temporal_observer": StaticObserver},
    "FSC": {"temporal_method": "nearest"},
    "TIAR+FSC": {"temporal_method": "gptq"},
    "cache": {"temporal_method": "nearest", "maintain": "cache"},
    "auto": {"temporal_method": "gptq", "maintain": "auto"},
}


def recipe_of(run: Run) -> Recipe:
    """Return the recipe of a run whose `method` is "variant,rest"."""
    variant, rest = run.method.split(",")
    recipe, changes = Recipe.preset(run.setting), dict(VARIANTS[variant])
    settings = {"method": rest, "temporal_method": changes.pop("temporal_method")}
    return dataclasses.replace(
        recipe, reconstruction=dataclasses.replace(recipe.reconstruction, **settings), **changes
    )


def interval(values: Sequence[float], form: str) -> str:
    """Return the mean ± half of its 95% confidence interval, as text."""
    text = f"{statistics.mean(values):{form}}"
    if len(values) < 2:
        return text
    return text + f" ± {STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values)):{form}}"


def table(found: dict[Run, dict[str, float]]) -> Table:
    shown = Table(
        "model", "bits", "variant, rest", "seeds", "temporal cos.\ndistance", "epsilon\nrel. MSE", "PSNR dB", "gain dB",
        "Frechet", "MB",
    )  # fmt: skip
    groups: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    for run, row in found.items():
        groups.setdefault((run.model, run.setting, run.method), {})[run.seed] = row
    order = list(VARIANTS)
    for key in sorted(groups, key=lambda k: (k[0], SETTINGS.index(k[1]), order.index(k[2].split(",")[0]))):
        rows = groups[key]
        base = groups.get((key[0], key[1], f"none,{key[2].split(',')[1]}"), {})
        gains = [rows[seed]["psnr"] - base[seed]["psnr"] for seed in rows.keys() & base.keys()]

        def column(name: str, form: str, rows: dict[int, dict[str, float]] = rows) -> str:
            return interval([row[name] for row in rows.values()], form)

        shown.add_row(
            *key, str(len(rows)), column("temporal", ".1e"), column("epsilon", ".1e"), column("psnr", ".2f"),
            interval(gains, "+.2f") if gains else "", column("frechet", ".4f"), f"{rows[min(rows)]['megabytes']:.3f}",
        )  # fmt: skip
    return shown


@torch.no_grad()
def estimators(model: str, output: Path, *, bits: int, repeats: int = 5) -> Table:
    """Return a table of the estimators: CPU time for the whole block, and the features' distance to float.

    Only activations are quantized, by the estimated ranges; the weights stay in float.
    """
    data, _ = prepare(output, model, 0, 2, TRAJECTORIES)
    pipe, finite = MODELS[model].pipeline(), MODELS[model].finite
    found = tfmq_fx.CalibrationSet.from_tensors(load_file(data))
    graph = tfmq_fx.capture(denoiser(pipe), found.arguments(slice(2)))
    shown = Table("estimator", "CPU s", f"temporal cosine distance, {bits} bits")
    known: dict[str, type[TemporalObserver]] = {"static": StaticObserver, **TEMPORAL_OBSERVERS}
    for name, observer in known.items():
        seconds = []
        for _ in range(repeats):
            recipe = Recipe(temporal_observer=observer, activation_bits=bits)
            prepared = tfmq_fx.prepare(fresh(graph), recipe, timesteps=found.timesteps, finite=finite)
            block = extract_temporal(prepared, temporal_of(prepared))
            rows = temporal_rows(prepared, found.tensors)
            exact = run_temporal(without_observers(block), rows)
            start = time.process_time()
            for chunk in chunks_of(rows):
                run_temporal(block, chunk)
            for _, o in observers(block):
                o.freeze()
            seconds.append(time.process_time() - start)
        for _, o in observers(block):
            set_mode(o, observe=False, quantize=isinstance(o, TemporalObserver))
        distance = cosine_distance(run_temporal(block, rows), exact).mean()
        shown.add_row(name, f"{statistics.median(seconds):.2f}", f"{distance:.2e}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/ablation"))
    parser.add_argument("--models", nargs="*", default=["digits", "flow"])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--rest", default="nearest", help="how the rest of the network is rounded")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument(
        "--observers", action="store_true", help="compare the estimators of activation ranges instead"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=150)
    if args.observers:
        for model in args.models:
            for bits in (8, 4):
                console.print(model, estimators(model, args.output, bits=bits))
    else:
        runs = [
            Run(model, setting, f"{variant},{args.rest}", seed, args.samples)
            for model in args.models
            for setting in args.settings
            for seed in range(args.seeds)
            for variant in args.variants
        ]

        def figures(run: Run) -> dict[str, float]:
            return measure(run, recipe_of(run), args.output, TRAJECTORIES)

        run_all(runs, results=RESULTS, figures=figures)
        console.print(table(read(RESULTS)))
    console.print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads", highlight=False
    )


if __name__ == "__main__":
    main()
