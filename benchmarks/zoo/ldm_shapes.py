"""The third trained model: latent diffusion with text by cross-attention, a diffusers `StableDiffusionPipeline`.

Trained by benchmarks/zoo/train_ldm_shapes.py on the captioned pictures of benchmarks/zoo/shapes.py.
"""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline

FOLDER = Path(__file__).parent / "ldm-shapes"


def ldm_shapes_pipeline() -> StableDiffusionPipeline:
    """The committed model with its DDIM scheduler; prompts as in `benchmarks.zoo.shapes.PROMPTS`."""
    return StableDiffusionPipeline.from_pretrained(FOLDER)
