"""How many steps does a sampler need before weights that make up for the rounding of activations lose?

    python -m benchmarks.few_steps

Quantizes trained models of benchmarks/zoo on the trajectories of samplers of few steps, as the preset does
and with `Reconstruction.corrected`, neither tuned, and samples as many steps. "error of a call" is the output's relative
mean squared error, averaged over the timesteps. PSNR is to the float network's samples of the same noise and steps.
"""

from __future__ import annotations

import argparse
import platform

import torch
from rich.console import Console
from rich.table import Table

import tfmq_fx
from benchmarks.recipes import rounded
from benchmarks.zoo.models import MODELS
from tfmq_fx.base.metrics import psnr, psnr_by_image
from tfmq_fx.calibration.pipelines import denoiser
from tfmq_fx.evaluation.sampling import sample

ROWS, SAMPLES, NOISE_SEED = 512, 128, 1000  # calibration rows, but at least 64 trajectories


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["digits", "flow"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 10])
    parser.add_argument("--preset", default="w4a4")
    args = parser.parse_args()
    torch.set_num_threads(1)
    preset = tfmq_fx.Recipe.preset(args.preset)
    table = Table(
        "model", "steps", "corrected", "error of a call", "PSNR dB: mean of images", "median", "pooled"
    )
    for model in args.models:
        entry = MODELS[model]
        pipe = entry.pipeline()
        pipe.set_progress_bar_config(disable=True)
        for steps in args.steps:
            data = tfmq_fx.CalibrationSet.record(
                pipe, num_samples=max(64, ROWS // steps), num_inference_steps=steps, seed=0, **entry.arguments
            )
            drawn = {"num_samples": SAMPLES, "num_inference_steps": steps, "seed": NOISE_SEED}
            clean = sample(pipe, **drawn, **entry.arguments)
            for corrected in (None, True):
                q = tfmq_fx.quantize(
                    denoiser(pipe),
                    rounded(preset, tune_iterations=0, corrected=corrected),
                    calibration=data,
                    finite=entry.finite,
                    seed=0,
                )
                errors = [e["output_relative_mse"] for e in q.report["errors_by_timestep"]]
                images = sample(pipe, q, **drawn, **entry.arguments)
                by_image = psnr_by_image(images, clean)
                figures = [f"{x:.1f}" for x in (by_image.mean(), by_image.median(), psnr(images, clean))]
                table.add_row(model, str(steps), str(corrected), f"{sum(errors) / len(errors):.2e}", *figures)
                Console(stderr=True).print(model, steps, corrected, *figures, highlight=False)
    Console(width=120).print(table)
    print(f"{args.preset}, {SAMPLES} samples; {platform.machine()}, torch {torch.__version__}, 1 thread")


if __name__ == "__main__":
    main()
