"""What do samples of the trained models look like? Writes PNG files of samples beside real images.

python -m benchmarks.zoo.pictures --output docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.digits import NUM_CLASSES, digits
from benchmarks.zoo.dit_digits import dit_digits_pipeline
from benchmarks.zoo.flow_digits import flow_digits_pipeline
from benchmarks.zoo.ldm_shapes import ldm_shapes_pipeline
from benchmarks.zoo.shapes import PROMPTS, draw
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.evaluation.sampling import sample, save_grid

MODELS = ("ddpm-digits", "dit-digits", "ldm-shapes", "flow-digits")
SEED, DIGITS = 1, 60


def picture(model: str, file: Path) -> None:
    if model == "ldm-shapes":
        pipe = ldm_shapes_pipeline()
        pipe.set_progress_bar_config(disable=True)
        # One sample per prompt. The first half asks for small shapes; each colour has three in a row.
        images = sample(
            pipe,
            num_samples=len(PROMPTS),
            num_inference_steps=50,
            seed=SEED,
            prompt=PROMPTS,
            guidance_scale=3.0,
        )
        columns = [
            ("drawn by formula", draw(torch.arange(len(PROMPTS)), seed=SEED)),
            ("DDIM 50, guidance 3, by caption", images),
        ]
        save_grid(columns, file, per_row=6)
        return
    real, label = digits()
    kwargs: dict[str, Any] = {}
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(SEED))[:DIGITS]
    if model == "dit-digits":
        pipe, title, steps = dit_digits_pipeline(), "DDIM 50, guidance 2, by label", 50
        kwargs = {"class_labels": list(range(NUM_CLASSES))}
        order = torch.stack(
            [(label == d).nonzero()[: DIGITS // NUM_CLASSES, 0] for d in range(NUM_CLASSES)], dim=1
        ).flatten()
    elif model == "flow-digits":
        pipe, title, steps = flow_digits_pipeline(), "flow matching, Euler 20", 20
    else:
        pipe, title, steps = embedded_pipeline(), "DDIM 50", 50
    pipe.set_progress_bar_config(disable=True)
    images = sample(pipe, num_samples=DIGITS, num_inference_steps=steps, seed=SEED, **kwargs)
    save_grid([("real digits", real[order]), (title, images)], file, per_row=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models:
        file = args.output / f"{model}.png"
        picture(model, file)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
