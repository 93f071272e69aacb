"""Are extra bits worth more in the layers that measured sensitivity selects than in others?

    python -m benchmarks.mixed_precision

Quantizes the embedded digits model with all weights rounded to nearest and activations at 8 bits. The budget
rises in quarters of the bytes between all layers at 4 bits and all at 8 bits. Within each budget, the layers
at 8 bits are chosen by measured sensitivity, drawn at random (three draws), or filled up in the order of the
graph. Reports PSNR to the float samples of the same noise (DDIM, 50 steps) and epsilon relative MSE on
calibration rows. "predicted" is the sum of the layers' errors that the choice minimises.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tfmq_fx
from tfmq_fx.base.metrics import psnr_by_image
from tfmq_fx.bit_widths import Sensitivity, with_bits
from tfmq_fx.capturing.calibrated import captured
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.evaluation.sampling import sample
from tfmq_fx.passes.quantize.state import state_of

STEPS, NOISE_SEED = 50, 1000
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def filled(found: Sensitivity, budget: float, order: list[Any]) -> dict[str, int]:
    """Return bits by layer: 8 for the layers of `order` that still fit the budget, 4 for the rest."""
    bits = {layer.path: min(layer.weight_errors) for layer in found.layers}
    for layer in order:
        wider = {**bits, layer.path: 8}
        if found.bytes(wider) <= budget:
            bits = wider
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    data = tfmq_fx.CalibrationSet.record(pipe, num_samples=64, num_inference_steps=STEPS, seed=0)
    recipe = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    gm, _, _ = captured(pipe.unet, data, "timestep")
    prepared = tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=data.timesteps), data)
    start = time.process_time()
    found = tfmq_fx.sensitivity(prepared, data)
    spent = time.process_time() - start
    floats = sample(pipe, num_samples=args.samples, num_inference_steps=STEPS, seed=NOISE_SEED)
    low, high = (
        found.bytes({layer.path: f(layer.weight_errors) for layer in found.layers}) for f in (min, max)
    )
    table = Table("bytes", "layers at 8 bits", "chosen by", "predicted", "epsilon rel. MSE", "PSNR dB")

    def row(name: str, bits: dict[str, int]) -> None:
        q = tfmq_fx.quantize(pipe.unet, with_bits(recipe, bits, state_of(prepared).plan), calibration=data)
        images = sample(pipe, q, num_samples=args.samples, num_inference_steps=STEPS, seed=NOISE_SEED)
        errors = [e["output_relative_mse"] for e in q.report["errors_by_timestep"]]
        table.add_row(
            f"{found.bytes(bits)}", f"{sum(b == 8 for b in bits.values())} of {len(bits)}", name, f"{found.error(bits):.2e}",
            f"{sum(errors) / len(errors):.2e}", f"{psnr_by_image(images, floats).mean():.2f}",
        )  # fmt: skip

    for share in SHARES:
        budget = low + share * (high - low)
        row("sensitivity", found.choose(max_bytes=budget))
        if 0 < share < 1:
            row("order of the graph", filled(found, budget, list(found.layers)))
            for draw in range(3):
                row(
                    f"chance {draw}",
                    filled(found, budget, random.Random(draw).sample(found.layers, len(found.layers))),
                )
    console = Console(width=130)
    console.print(table)
    console.print(
        f"sensitivities of {len(found.layers)} layers, 64 rows: {spent:.0f} CPU s; {args.samples} samples; torch "
        f"{torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads",
        highlight=False,
    )


if __name__ == "__main__":
    main()
