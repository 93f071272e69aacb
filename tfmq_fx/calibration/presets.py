"""The papers' calibration settings, by name: `CalibrationPreset.named("sd14-coco").record(pipe, prompt=captions)`.

The settings are those of the reference code (TFMQ-DM, Huang et al. 2024; after Q-Diffusion, Li et al. 2023), with
one difference: the reference code restarts every trajectory for each timestep, while here one recorded trajectory
per sample gives the same rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.calibration.data import CalibrationSet


class QuadraticDDIMScheduler(diffusers.DDIMScheduler):  # type: ignore[misc]
    """A DDIM scheduler whose timesteps are the squares of evenly spaced numbers (Song et al. 2021, appendix D.2).

    Diffusers has no such spacing. The largest timestep is 0.8 times the number of training timesteps. Small ones
    may round to the same integer, and are then taken repeatedly.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        largest = np.sqrt(self.config.num_train_timesteps * 0.8)
        values = (np.linspace(0, largest, num_inference_steps) ** 2).astype(int)
        self.timesteps = torch.from_numpy(values).flip(0).to(device)
        self._step = 0

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Step from this timestep to the schedule's next (Song et al. 2021, eq. 12).

        Raises TFMQError unless the network predicts the noise.
        """
        if self.config.prediction_type != "epsilon":
            raise TFMQError(
                f"QuadraticDDIMScheduler: prediction_type={self.config.prediction_type!r} is not supported; use 'epsilon'."
            )
        self._step += 1
        after = self.timesteps[self._step] if self._step < len(self.timesteps) else None
        a = self.alphas_cumprod[timestep]
        a_next = self.final_alpha_cumprod if after is None else self.alphas_cumprod[after]
        x0 = (sample - (1 - a).sqrt() * model_output) / a.sqrt()
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        epsilon = (sample - a.sqrt() * x0) / (1 - a).sqrt() if use_clipped_model_output else model_output
        sigma = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).clamp(min=0).sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next - sigma**2).clamp(min=0).sqrt() * epsilon
        if eta > 0:
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + sigma * noise
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x,)


@dataclass(frozen=True, kw_only=True)
class CalibrationPreset:
    """The calibration settings of one row of the papers' tables. The defaults are those of `quantize`."""

    name: str = "default"
    source: str = ""  # the row of the papers' tables
    # Replaces the pipeline's own scheduler, with the same configuration; None keeps its own.
    scheduler: type[Any] | None = None
    num_samples: int = 64  # trajectories; with prompts, one for each
    num_inference_steps: int | None = 50  # None: as many as a pipeline has that takes no number
    num_rows: int | None = None  # drawn evenly over the timesteps; None: all
    arguments: dict[str, Any] = field(default_factory=dict)  # passed to the pipeline
    needs: tuple[str, ...] = ()  # arguments that the caller must give

    @staticmethod
    def named(name: str) -> CalibrationPreset:
        """Return the preset of this name. Raises TFMQError, with the nearest names, for an unknown one."""
        if name not in PRESETS:
            raise TFMQError(
                f"calibration preset: {name!r} is unknown; use one of {nearest_names(name, PRESETS)}."
            )
        return PRESETS[name]

    def with_scheduler(self, pipe: Any) -> Any:
        """Give the pipeline this preset's scheduler, in place, and return it.

        A pipeline must be sampled with the scheduler that it was calibrated with.
        """
        if self.scheduler is not None:
            pipe.scheduler = self.scheduler.from_config(pipe.scheduler.config)
        return pipe

    def record(self, pipe: Any, *, seed: int = 0, **changes: Any) -> CalibrationSet:
        """Call `CalibrationSet.record` with these settings, and restore the pipeline's own scheduler afterwards.

        changes: override the settings (num_samples, prompt, cache, ...). Raises TFMQError if an argument that the
        preset needs is missing.
        """
        missing = [n for n in self.needs if n not in changes]
        if missing:
            raise TFMQError(
                f"calibration preset {self.name!r}: give {missing[0]}=, as in record(pipe, {missing[0]}=[..])."
            )
        num_rows = changes.pop("num_rows", self.num_rows)
        settings = {
            "num_samples": self.num_samples, "num_inference_steps": self.num_inference_steps, **self.arguments, **changes
        }  # fmt: skip
        own = pipe.scheduler
        try:
            data = CalibrationSet.record(self.with_scheduler(pipe), seed=seed, **settings)
        finally:
            pipe.scheduler = own
        return data if num_rows is None else data.spread(num_rows, seed=seed)


_DDIM = diffusers.DDIMScheduler
_LDM = CalibrationPreset(
    scheduler=_DDIM, num_samples=256, num_inference_steps=200, num_rows=5120
)  # fmt: skip
PRESETS = {
    preset.name: preset
    for preset in (
        CalibrationPreset(
            name="ddim-cifar10", source="DDIM, CIFAR-10 32x32: 100 quadratic steps, 256 rows of each",
            scheduler=QuadraticDDIMScheduler, num_samples=256, num_inference_steps=100,
        ),
        dataclasses.replace(_LDM, name="ldm-bedrooms", source="LDM-4, LSUN bedrooms", arguments={"eta": 1.0}),
        dataclasses.replace(_LDM, name="ldm-churches", source="LDM-8, LSUN churches", num_inference_steps=400),
        dataclasses.replace(_LDM, name="ldm-celebahq", source="LDM-4, CelebA-HQ", arguments={"eta": 0.0}),
        dataclasses.replace(_LDM, name="ldm-ffhq", source="LDM-4, FFHQ", arguments={"eta": 1.0}),
        CalibrationPreset(
            name="ldm-imagenet", source="LDM-4, ImageNet: guidance 3, rows with and without the class",
            scheduler=_DDIM, num_samples=512, num_inference_steps=20, arguments={"guidance_scale": 3.0},
            needs=("class_labels",),
        ),
        CalibrationPreset(
            name="sd14-coco", source="Stable Diffusion v1-4, MS-COCO: PLMS, guidance 7.5, 128 captions with and without",
            scheduler=diffusers.PNDMScheduler, num_samples=128, num_inference_steps=50, arguments={"guidance_scale": 7.5},
            needs=("prompt",),
        ),
        CalibrationPreset(
            name="sdxl", source="Stable Diffusion XL, MS-COCO: guidance 7.5, 64 captions with and without",
            scheduler=diffusers.EulerDiscreteScheduler, num_samples=64, num_inference_steps=50,
            arguments={"guidance_scale": 7.5}, needs=("prompt",),
        ),
    )
}  # fmt: skip
