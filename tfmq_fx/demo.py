"""The embedded model: an unconditional DDPM on handwritten digits, trained by benchmarks/train_digits.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "ddpm-digits"


def embedded_pipeline() -> Any:
    """The shipped DDPMPipeline (16x16 grey images), with a DDIM scheduler so that 50 steps are enough."""
    from diffusers import DDIMScheduler, DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(FOLDER)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe
