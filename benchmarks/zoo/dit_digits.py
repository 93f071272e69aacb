"""The second trained model: a class-conditional diffusion transformer on digits, and its pipeline.

benchmarks/zoo/train_dit_digits.py trains it. diffusers' DiTPipeline decodes latents with a VAE. This model
works on pixels, so it has its own pipeline, with DiTPipeline's arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

FOLDER = Path(__file__).parent / "dit-digits"


class DiTDigitsPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline with a `DiTTransformer2DModel` on pixels: `transformer` and `scheduler`, no VAE.

    Classes are 0 .. num_embeds_ada_norm - 1. The class after the last means "no label" and is used for
    guidance.
    """

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
    ) -> Any:
        """Return images for class labels.

        class_labels: repeated in turn up to `batch_size`, so that a caller that samples in batches
            (CalibrationSet.record) can name all classes once. None draws balanced labels from the generator.
        batch_size: the number of images; None: one per label.
        """
        config = self.transformer.config
        classes = config.num_embeds_ada_norm
        given = None if class_labels is None else torch.as_tensor(class_labels).reshape(-1)
        if given is not None and not (len(given) and ((given >= 0) & (given <= classes)).all()):
            raise ValueError(
                f"class_labels: {given.tolist()}; must be at least one, each from 0 to {classes}."
            )
        size = batch_size or (1 if given is None else len(given))
        # Draw the noise first, so that it does not depend on the labels.
        x = randn_tensor(
            (size, config.in_channels, config.sample_size, config.sample_size),
            generator=generator,
            device=self._execution_device,
            dtype=self.transformer.dtype,
        )
        x = x * self.scheduler.init_noise_sigma
        labels = (
            _balanced(size, classes, generator) if given is None else given.repeat(-(-size // len(given)))
        )
        labels = labels[:size].to(x.device)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, classes)])
        self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            noise = self.transformer(
                model_input, timestep=t.expand(len(model_input)), class_labels=labels
            ).sample
            if guided:
                labelled, unlabelled = noise.chunk(2)
                noise = unlabelled + guidance_scale * (labelled - unlabelled)
            x = self.scheduler.step(noise, t, x).prev_sample
        images: Any = VaeImageProcessor().postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _balanced(size: int, classes: int, generator: torch.Generator | None) -> Tensor:
    """Return at least `size` random labels. In any prefix, class counts differ by at most one."""
    rounds = -(-size // classes)
    return torch.cat([torch.randperm(classes, generator=generator) for _ in range(rounds)])


def dit_digits_pipeline() -> DiTDigitsPipeline:
    """Return the committed model with its DDIM scheduler."""
    pipe: DiTDigitsPipeline = DiTDigitsPipeline.from_pretrained(FOLDER)
    return pipe
