"""Load the embedded model: an unconditional DDPM on handwritten digits.

It was trained by benchmarks/train_digits.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "ddpm-digits"


def embedded_pipeline() -> Any:
    """Return the shipped DDPMPipeline (16x16 grey images). Its DDIM scheduler makes 50 steps enough."""
    from diffusers import DDIMScheduler, DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(FOLDER)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe
