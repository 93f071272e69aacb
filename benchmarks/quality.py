"""How much quality does quantization cost on the demo model? A table of docs/measured/quality.md.

    python -m benchmarks.quality --samples 1024 --seeds 3

Samples by DDIM (50 steps, eta 0), quantized and float from the same noise, with three quantization seeds
(each draws its own calibration trajectories). The table includes round-to-nearest. Recognition is the share
of samples that a classifier trained on real digits recognises with confidence over 0.9.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tfmq_fx
from benchmarks.digits import NUM_CLASSES, recognise, train_classifier
from benchmarks.recipes import named
from tfmq_fx.base.metrics import psnr, psnr_by_image
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.evaluation.sampling import sample

STEPS = 50
NOISE_SEED = 1000


def measure(images: Tensor, reference: Tensor, classifier: nn.Module) -> dict[str, float]:
    label, confidence = recognise(classifier, images)
    by_image = psnr_by_image(images, reference)
    return {
        "psnr": by_image.mean().item(),
        "psnr_median": by_image.median().item(),
        "psnr_pooled": psnr(images, reference),
        "recognised": (confidence > 0.9).float().mean().item() * 100,
        "same_digit": (label == recognise(classifier, reference)[0]).float().mean().item() * 100,
        "digits": float((torch.bincount(label, minlength=NUM_CLASSES) > 0).sum()),
    }


@dataclasses.dataclass
class Run:
    figures: dict[str, list[dict[str, float]]]  # by setting, including "float": one row per seed
    images: dict[str, Tensor]  # for the first seed
    models: dict[str, tfmq_fx.QuantizedModel]  # for the first seed


def run(
    names: list[str], *, samples: int, seeds: int, once: Sequence[str] = (), num_trajectories: int = 64
) -> Run:
    """Run every setting of `names` with each seed, and those of `once` with the first seed only."""
    recipes = {name: named(name) for name in [*names, *once]}
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    classifier = train_classifier()
    started = time.monotonic()
    reference = sample(pipe, num_samples=samples, num_inference_steps=STEPS, seed=NOISE_SEED)
    label, confidence = recognise(classifier, reference)
    figures: dict[str, list[dict[str, float]]] = {
        "float": [
            {
                "recognised": (confidence > 0.9).float().mean().item() * 100,
                "digits": float((torch.bincount(label, minlength=NUM_CLASSES) > 0).sum()),
                "sample_seconds": time.monotonic() - started,
                "megabytes": sum(p.numel() * 4 for p in pipe.unet.parameters()) / 1e6,
            }
        ]
    }
    images = {"float": reference}
    models: dict[str, tfmq_fx.QuantizedModel] = {}
    for seed in range(seeds):
        calibration = tfmq_fx.CalibrationSet.record(
            pipe, num_samples=num_trajectories, num_inference_steps=STEPS, seed=seed
        )
        for name in [*names, *once] if seed == 0 else names:
            started = time.monotonic()
            q = tfmq_fx.quantize(pipe, recipes[name], calibration=calibration, seed=seed)
            quantized = time.monotonic()
            y = sample(pipe, q, num_samples=samples, num_inference_steps=STEPS, seed=NOISE_SEED)
            errors = q.report["errors_by_timestep"]
            row = {
                **measure(y, reference, classifier),
                "temporal_mean": statistics.mean(e["temporal_cosine_distance"] for e in errors),
                "temporal_worst": max(e["temporal_cosine_distance_worst"] for e in errors),
                "output_relative_mse": statistics.mean(e["output_relative_mse"] for e in errors),
                "quantize_seconds": quantized - started,
                "sample_seconds": time.monotonic() - quantized,
                "megabytes": q.report["sizes"]["quantized_bytes"] / 1e6,
            }
            figures.setdefault(name, []).append(row)
            images.setdefault(name, y)
            models.setdefault(name, q)
            Console(stderr=True).print(
                f"seed {seed} {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()), highlight=False
            )
    return Run(figures, images, models)


def spread(rows: list[dict[str, float]], key: str, digits: int = 2) -> str:
    values = [r[key] for r in rows if key in r]
    if not values:
        return ""
    form = f".{digits}e" if key.startswith(("temporal", "output")) else f".{digits}f"
    text = f"{statistics.mean(values):{form}}"
    return text + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def table(figures: dict[str, list[dict[str, float]]]) -> Table:
    shown = Table(
        "setting", "PSNR dB\n(mean of images)", "PSNR dB\n(median)", "PSNR dB\n(pooled)", "temporal cos.\ndistance, mean", "worst t\nand feature",
        "recognised %", "MB", "quantize s", "sample s",
    )  # fmt: skip
    for name, rows in figures.items():
        shown.add_row(
            name, spread(rows, "psnr"), spread(rows, "psnr_median"), spread(rows, "psnr_pooled"),
            spread(rows, "temporal_mean", 1), spread(rows, "temporal_worst", 1),
            spread(rows, "recognised", 1), spread(rows[:1], "megabytes"), spread(rows, "quantize_seconds", 0),
            spread(rows, "sample_seconds", 0),
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=["w8a8", "w4a8", "w4a8 nearest"])
    once = ["w8a8 nearest", "w8a8 float8", "w8a8 all int8", "w4a8 all int8", "w4a8 attention"]
    parser.add_argument("--once", nargs="*", default=once, help="settings run with the first seed only")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    args = parser.parse_args()
    figures = run(args.settings, samples=args.samples, seeds=args.seeds, once=args.once).figures
    console = Console(width=150)
    console.print(table(figures))
    console.print(
        f"{args.samples} samples, DDIM {STEPS} steps, {args.seeds} quantization seeds, range 2; torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads",
        highlight=False,
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
