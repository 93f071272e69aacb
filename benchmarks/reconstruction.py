"""What does each rounding method cost, and what is it worth?

    python -m benchmarks.reconstruction --output out/reconstruction

Runs every method at every bit width on the two trained models with three seeds (each draws its own
calibration trajectories), then the iteration curve of AdaRound. Each run has its own process, to measure its
CPU seconds (over all threads) and its peak memory. Finished runs are kept in benchmarks/reconstruction.jsonl
with the revision they ran at, and are not repeated; the table is printed from that file. Remove the runs that
a change of the library made stale.

Quantized and float samples start from the same noise (DDIM, 50 steps). Frechet distance is between 64
features of the digits classifier for quantized and for float samples. Its floor is the distance between float
samples of different noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import tfmq_fx
from benchmarks.recipes import unchosen
from benchmarks.zoo.models import MODELS
from tfmq_fx.base.metrics import frechet_distance, psnr, psnr_by_image
from tfmq_fx.calibration.pipelines import denoiser
from tfmq_fx.evaluation.sampling import sample
from tfmq_fx.recipe import Recipe

NOISE_SEED, TRAJECTORIES = 1000, 64
METHODS = ("nearest", "gptq", "gptq+adaround", "adaround")
SETTINGS = ("w8a8", "w4a8", "w4a4", "w3a8")
CURVE = (100, 1000, 4000, 20000)  # without tuning; the default is 400
RESULTS = Path(__file__).with_suffix(".jsonl")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the benchmark.

    method: one of recipe.METHODS, or with fields of Reconstruction or Recipe, such as
    "adaround,iterations=100,group_size=64". With the word "chosen", what the preset leaves open is chosen; without
    it, it is as in all runs before presets did that.
    """

    model: str
    setting: str
    method: str
    seed: int
    samples: int

    @property
    def recipe(self) -> Recipe:
        name, *changes = self.method.split(",")
        recipe = Recipe.preset(self.setting)
        if "chosen" in changes:
            changes.remove("chosen")
        else:
            recipe = unchosen(recipe)
        settings: dict[str, Any] = {"method": name}
        others: dict[str, Any] = {}
        for change in changes:
            key, _, text = change.partition("=")
            value = text if text.isidentifier() and text not in ("true", "false") else json.loads(text)
            (settings if hasattr(recipe.reconstruction, key) else others)[key] = value
        reconstruction = dataclasses.replace(recipe.reconstruction, **settings)
        return dataclasses.replace(recipe, reconstruction=reconstruction, **others)


def prepare(
    output: Path, model: str, seed: int, samples: int, trajectories: int = TRAJECTORIES
) -> tuple[Path, Path]:
    """Write the calibration set and the float samples to disk, so that no run pays for them."""
    entry = MODELS[model]
    rows = f"{model}-{seed}" if trajectories == TRAJECTORIES else f"{model}-{seed}-{trajectories}"
    data, reference = output / f"{rows}.safetensors", output / f"{model}-float-{samples}.safetensors"
    if not data.exists():
        found = tfmq_fx.CalibrationSet.record(
            entry.pipeline(),
            num_samples=trajectories,
            num_inference_steps=entry.steps,
            seed=seed,
            **entry.arguments,
        )
        save_file(found.tensors, data)
    if not reference.exists():
        drawn = {
            name: sample(
                entry.pipeline(),
                num_samples=samples,
                num_inference_steps=entry.steps,
                seed=noise,
                **entry.arguments,
            ).contiguous()
            for name, noise in (("same", NOISE_SEED), ("other", NOISE_SEED + 1))
        }
        save_file(drawn, reference)
    return data, reference


def measure(run: Run, recipe: Recipe, output: Path, trajectories: int = TRAJECTORIES) -> dict[str, float]:
    """Quantize, sample and measure, with the model, seed and number of samples of `run`."""
    data, reference = prepare(output, run.model, run.seed, run.samples, trajectories)
    entry = MODELS[run.model]
    pipe = entry.pipeline()
    network = denoiser(pipe)
    calibration = tfmq_fx.CalibrationSet.from_tensors(load_file(data))
    started, cpu = time.monotonic(), time.process_time()
    q = tfmq_fx.quantize(network, recipe, calibration=calibration, finite=entry.finite, seed=run.seed)
    row = {
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    row |= {f"cpu_{stage}": seconds for stage, seconds in q.report["cpu_seconds"].items()}
    images = sample(
        pipe,
        q,
        num_samples=run.samples,
        num_inference_steps=entry.steps,
        seed=NOISE_SEED,
        **entry.arguments,
    )
    floats, errors = load_file(reference), q.report["errors_by_timestep"]
    of_float = entry.features(floats["same"], output)
    by_image = psnr_by_image(images, floats["same"])
    return row | {
        "psnr": by_image.mean().item(),
        "psnr_median": by_image.median().item(),
        "psnr_pooled": psnr(images, floats["same"]),
        "recognised": entry.good(images, output),
        "frechet": frechet_distance(entry.features(images, output), of_float),
        "frechet_floor": frechet_distance(entry.features(floats["other"], output), of_float),
        "temporal": statistics.mean(e["temporal_cosine_distance"] for e in errors),
        "epsilon": statistics.mean(e["output_relative_mse"] for e in errors),
        "megabytes": q.report["sizes"]["quantized_bytes"] / 1e6,
    }


def read(results: Path) -> dict[Run, dict[str, float]]:
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return {Run(**line["run"]): line["figures"] for line in lines}


def revision() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()


def in_a_process(run: Run, *, output: Path) -> dict[str, float]:
    """Run `measure` in its own process, so that CPU seconds and peak memory are the run's alone."""
    prepare(output, run.model, run.seed, run.samples)
    command = [sys.executable, "-m", "benchmarks.reconstruction", "--output", str(output)]
    command += ["--one", json.dumps(dataclasses.asdict(run))]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def run_all(runs: Iterable[Run], *, results: Path, figures: Callable[[Run], dict[str, float]]) -> None:
    """Run those that `results` lacks, and append their figures to it."""
    for run in runs:
        if run in read(results):
            continue
        row = figures(run)
        line = {"run": dataclasses.asdict(run), "revision": revision(), "figures": row}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['run']}: {row['psnr']:.2f} dB, {row['cpu_seconds']:.0f} CPU s", file=sys.stderr)


def spread(rows: Iterable[dict[str, float]], key: str, form: str) -> str:
    values = [r[key] for r in rows]
    text = f"{statistics.mean(values):{form}}"
    return text + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def table(found: dict[Run, dict[str, float]]) -> Table:
    shown = Table(
        "model", "bits", "method", "seeds", "PSNR dB\n(mean of images)", "PSNR dB\n(pooled)", "epsilon\nrel. MSE",
        "temporal cos.\ndistance", "Frechet\n(floor)", "recognised %", "CPU s", "of it\nreconstruct", "peak GiB",
    )  # fmt: skip
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for run, row in found.items():
        groups.setdefault((run.model, run.setting, run.method), []).append(row)
    for key in sorted(groups, key=lambda k: (k[0], SETTINGS.index(k[1]) if k[1] in SETTINGS else 9, k[2])):
        rows = groups[key]
        shown.add_row(
            *key, str(len(rows)), spread(rows, "psnr", ".2f"), spread(rows, "psnr_pooled", ".2f"),
            spread(rows, "epsilon", ".1e"), spread(rows, "temporal", ".1e"),
            f"{spread(rows, 'frechet', '.4f')} ({rows[0]['frechet_floor']:.4f})", spread(rows, "recognised", ".1f"),
            spread(rows, "cpu_seconds", ".0f"), spread(rows, "cpu_reconstruct", ".0f"), spread(rows, "peak_gib", ".2f"),
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/reconstruction"))
    parser.add_argument("--models", nargs="*", default=["digits", "dit"])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument(
        "--curve", nargs="*", type=int, default=list(CURVE), help="iterations, w4a8, digits, seed 0"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the run, as JSON, of a child process
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.one:
        run = Run(**json.loads(args.one))
        print(json.dumps(measure(run, run.recipe, args.output)))
        return
    runs = [
        Run(model, setting, method, seed, args.samples)
        for model in args.models
        for setting in args.settings
        for seed in range(args.seeds)
        for method in args.methods
    ]
    runs += [
        Run("digits", "w4a8", f"adaround,iterations={n},tune_iterations=0", 0, args.samples)
        for n in args.curve
    ]
    run_all(runs, results=RESULTS, figures=partial(in_a_process, output=args.output))
    console = Console(width=170)
    console.print(table(read(RESULTS)))
    console.print(
        f"50 steps (flow: 20), {args.samples} samples, {TRAJECTORIES} calibration trajectories; torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads",
        highlight=False,
    )


if __name__ == "__main__":
    main()
