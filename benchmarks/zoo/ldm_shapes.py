"""The third trained model: latent diffusion with cross-attention to text, a `StableDiffusionPipeline`.

benchmarks/zoo/train_ldm_shapes.py trains it on the captioned images of benchmarks/zoo/shapes.py.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline

FOLDER = Path(__file__).parent / "ldm-shapes"


def ldm_shapes_pipeline() -> StableDiffusionPipeline:
    """Return the committed model with its DDIM scheduler, for prompts as in `benchmarks.zoo.shapes.PROMPTS`."""
    return StableDiffusionPipeline.from_pretrained(FOLDER)
