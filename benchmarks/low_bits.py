"""What helps at few bits, and where do samples break down? The table of docs/measured/low_bits.md.

    python -m benchmarks.low_bits --bits w4a4 w3a8 w2a8 --method gptq

Samples the embedded digits model by DDIM (50 steps, eta 0), quantized and float from the same noise, with one
quantization seed. A variant joins the names of passes by "+": smooth (alpha 0.5), smooth0.75, rotate16,
rank8. "plain" has none of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tfmq_fx
from benchmarks.digits import recognise, train_classifier
from benchmarks.quality import NOISE_SEED, STEPS, measure
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.evaluation.sampling import sample
from tfmq_fx.recipe import Recipe, Reconstruction

VARIANTS = (
    "plain",
    "smooth",
    "rotate16",
    "rank8",
    "smooth+rotate16",
    "rotate16+rank8",
    "smooth+rotate16+rank8",
)


def variant(bits: str, text: str, method: str) -> Recipe:
    """Return the recipe of, say, ("w3a8", "rotate16+rank8", "gptq").

    If `text` is "preset", return the preset of these bits and ignore `method`.
    """
    if text == "preset":
        return Recipe.preset(bits)
    weight, activation = (int(b) for b in bits[1:].split("a"))
    changes: dict[str, Any] = {}
    for word in text.split("+"):
        if word.startswith("smooth"):
            changes["smooth"] = float(word[6:] or 0.5)
        elif word.startswith("rotate"):
            changes["rotate"] = int(word[6:])
        elif word.startswith("rank"):
            changes["low_rank"] = int(word[4:])
        elif word != "plain":
            raise SystemExit(
                f"--variants: {word!r} is none of plain, smooth[ALPHA], rotate<BLOCK>, rank<RANK>."
            )
    return Recipe(
        weight_bits=weight,
        activation_bits=activation,
        reconstruction=Reconstruction(method=method, tune_iterations=0),
        **changes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a8", "w2a8"])
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--method", default="gptq", help="of reconstruction: nearest, gptq, adaround")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--trajectories", type=int, default=24)
    parser.add_argument("--json", type=Path, help="also append every figure here, a line a row")
    args = parser.parse_args()
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    classifier = train_classifier()
    reference = sample(pipe, num_samples=args.samples, num_inference_steps=STEPS, seed=NOISE_SEED)
    data = tfmq_fx.CalibrationSet.record(
        pipe, num_samples=args.trajectories, num_inference_steps=STEPS, seed=0
    )
    confident = (recognise(classifier, reference)[1] > 0.9).float().mean().item() * 100
    shown = Table(
        "bits", "passes", "PSNR dB\n(mean of images)", "PSNR dB\n(pooled)", "recognised %", "same digit %", "MB", "of it added", "nodes",
        "quantize s", "sample s",
    )  # fmt: skip
    shown.add_row("float", "", "", "", f"{confident:.1f}", "", f"{_megabytes(pipe.unet):.2f}", "", "", "", "")
    for bits in args.bits:
        for text in args.variants:
            started = time.monotonic()
            q = tfmq_fx.quantize(pipe, variant(bits, text, args.method), calibration=data, seed=0)
            quantized = time.monotonic()
            y = sample(pipe, q, num_samples=args.samples, num_inference_steps=STEPS, seed=NOISE_SEED)
            row = {
                **measure(y, reference, classifier),
                "mb": q.report["sizes"]["quantized_bytes"] / 1e6,
                "added_mb": q.report["sizes"]["low_bits_bytes"] / 1e6,
                "nodes": float(len(q.network.graph.nodes)),
                "quantize": quantized - started,
                "sample": time.monotonic() - quantized,
            }
            figures = [
                f"{row[k]:.{d}f}"
                for k, d in (("psnr", 2), ("psnr_pooled", 2), ("recognised", 1), ("same_digit", 1), ("mb", 2), ("added_mb", 3),
                             ("nodes", 0), ("quantize", 0), ("sample", 0))
            ]  # fmt: skip
            shown.add_row(bits, text, *figures)
            Console(stderr=True).print(bits, text, args.method, *figures, highlight=False)
            if args.json:
                with args.json.open("a") as file:
                    file.write(
                        json.dumps({"bits": bits, "passes": text, "method": args.method, **row}) + "\n"
                    )
    console = Console(width=150)
    console.print(shown)
    console.print(
        f"{args.method}; {args.samples} samples, DDIM {STEPS} steps, {args.trajectories} calibration trajectories, 1 seed; "
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads",
        highlight=False,
    )


def _megabytes(network: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in network.parameters()) / 1e6


if __name__ == "__main__":
    main()
