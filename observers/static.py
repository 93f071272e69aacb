"""One (scale, zero_point) per tensor: activations outside the temporal block."""

from __future__ import annotations

import torch
from torch import Tensor

from tfmq_fx._torchao import FakeQuantize
from tfmq_fx.errors import TFMQError


class StaticFakeQuantize(FakeQuantize):  # type: ignore[misc]
    """torchao's FakeQuantize, with the qparams computed once after calibration instead of after every batch.

    torchao's convert turns it into a quantize/dequantize pair with literal scale and zero point.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.observer_enabled[0]:
            self.activation_post_process(x.detach())
        if self.fake_quant_enabled[0]:
            x = torch.fake_quantize_per_tensor_affine(
                x, self.scale, self.zero_point, self.quant_min, self.quant_max
            )
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The frozen qparams: what the fake-quantized network computed with."""
        return self.scale, self.zero_point

    def freeze(self) -> None:
        """Stop observing, start quantizing with the qparams found."""
        observer = self.activation_post_process
        if torch.isinf(observer.min_val).any():
            raise TFMQError(
                "calibration: an activation was never observed; run the calibration data through the prepared graph."
            )
        scale, zero_point = observer.calculate_qparams()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.disable_observer()
        self.enable_fake_quant()
