"""The fourth trained model: flow matching on digits by a UNet whose time is a float, and its pipeline.

benchmarks/zoo/train_flow_digits.py trains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

FOLDER = Path(__file__).parent / "flow-digits"


class FlowDigitsPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline with an unconditional `UNet2DModel` that predicts the velocity from data to noise.

    `scheduler` is a FlowMatchEulerDiscreteScheduler. The share of noise, s, goes from 1 to 0; the network
    gets 1000 s.
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        config = self.unet.config
        x = randn_tensor(
            (batch_size, config.in_channels, config.sample_size, config.sample_size),
            generator=generator,
            device=self._execution_device,
            dtype=self.unet.dtype,
        )
        self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            velocity = self.unet(x, t.expand(batch_size)).sample
            x = self.scheduler.step(velocity, t, x).prev_sample
        images: Any = VaeImageProcessor().postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def flow_digits_pipeline() -> FlowDigitsPipeline:
    """Return the committed model with its Euler scheduler."""
    pipe: FlowDigitsPipeline = FlowDigitsPipeline.from_pretrained(FOLDER)
    return pipe
