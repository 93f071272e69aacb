"""How much quality does quantization cost the class-conditional transformer?

    python -m benchmarks.zoo.quality_dit_digits --settings "w8a8 nearest" "w4a8 nearest" --samples 128

Samples by DDIM (50 steps, guidance 2), quantized and float from the same noise and label. Recognition is the
share of samples that a classifier trained on real digits recognises, with confidence over 0.9, as the label
asked for.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tfmq_fx
from benchmarks.digits import NUM_CLASSES, recognise, train_classifier
from benchmarks.quality import NOISE_SEED, STEPS
from benchmarks.recipes import named
from benchmarks.zoo.dit_digits import dit_digits_pipeline
from tfmq_fx.base.metrics import psnr, psnr_by_image
from tfmq_fx.evaluation.sampling import sample

LABELS = list(range(NUM_CLASSES))


def as_asked(classifier: nn.Module, images: Tensor) -> float:
    """Return the percentage recognised, with confidence over 0.9, as the label asked for. Labels take turns."""
    label, confidence = recognise(classifier, images)
    good = (confidence > 0.9) & (label == torch.arange(len(images)) % NUM_CLASSES)
    return good.float().mean().item() * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--trajectories", type=int, default=32, help="of the calibration set")
    parser.add_argument("--settings", nargs="*", default=["w8a8 nearest", "w4a8 nearest"])
    parser.add_argument("--no-labels", action="store_true", help="leave the labels out of the temporal key")
    args = parser.parse_args()
    recipes = {name: named(name) for name in args.settings}
    torch.set_num_threads(1)
    pipe = dit_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    classifier = train_classifier()
    # Labels take turns within a batch. With a multiple of the classes, they also take turns over all samples.
    drawn = {"num_samples": args.samples, "batch_size": 250, "num_inference_steps": STEPS, "seed": NOISE_SEED}
    started = time.monotonic()
    reference = sample(pipe, **drawn, class_labels=LABELS)
    table = Table("setting", "PSNR dB\n(mean of images)", "PSNR dB\n(pooled)", "temporal cos.\ndistance, mean", "worst",
                  "recognised %", "MB", "quantize s", "sample s")  # fmt: skip
    floats = sum(p.numel() * 4 for p in pipe.transformer.parameters()) / 1e6
    table.add_row("float", "", "", "", "", f"{as_asked(classifier, reference):.1f}", f"{floats:.2f}", "",
                  f"{time.monotonic() - started:.0f}")  # fmt: skip
    if not args.settings:
        Console(width=150).print(table)
        return
    data = tfmq_fx.CalibrationSet.record(
        pipe, num_samples=args.trajectories, num_inference_steps=STEPS, class_labels=LABELS
    )
    # Guidance calls the network with the labels and with the "no label" class after the last.
    finite = None if args.no_labels else {"class_labels": range(NUM_CLASSES + 1)}
    for name, recipe in recipes.items():
        started = time.monotonic()
        q = tfmq_fx.quantize(pipe, recipe, calibration=data, finite=finite)
        quantized = time.monotonic()
        y = sample(pipe, q, **drawn, class_labels=LABELS)
        errors = q.report["errors_by_timestep"]
        table.add_row(
            name,
            f"{psnr_by_image(y, reference).mean():.2f}",
            f"{psnr(y, reference):.2f}",
            f"{statistics.mean(e['temporal_cosine_distance'] for e in errors):.1e}",
            f"{max(e['temporal_cosine_distance_worst'] for e in errors):.1e}",
            f"{as_asked(classifier, y):.1f}",
            f"{q.report['sizes']['quantized_bytes'] / 1e6:.2f}",
            f"{quantized - started:.0f}",
            f"{time.monotonic() - quantized:.0f}",
        )
    console = Console(width=150)
    console.print(table)
    console.print(
        f"{args.samples} samples, DDIM {STEPS} steps, {args.trajectories} calibration trajectories; torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} thread",
        highlight=False,
    )


if __name__ == "__main__":
    main()
