"""One (scale, zero_point) per tensor: activations outside the temporal block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.base._torchao import FakeQuantize
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.observers.kept_dtype import KeptDtype


class StaticFakeQuantize(KeptDtype, FakeQuantize):  # type: ignore[misc]
    """torchao's FakeQuantize, with the qparams computed once after calibration instead of after every batch.

    torchao's convert turns it into a quantize/dequantize pair with literal scale and zero point.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if hasattr(self.activation_post_process, "dst_nbins"):
            # torchao's range search assumes all values of the dtype, but we use only the lowest of them.
            self.activation_post_process.dst_nbins = self.quant_max - self.quant_min + 1
        self.log_scale: Tensor | None = None  # while the scale is being learned
        self.soft: Tensor | None = None  # the scale that the graph then computes with

    def start_learning(self) -> Tensor:
        """Return a variable, the logarithm of the scale, that moves the scale. The zero point stays."""
        self.log_scale = self.scale.detach().log().requires_grad_()
        return self.log_scale

    def soften(self) -> Tensor:
        """Return the scale as a function of the variable; `soft` gets the same value, detached from it."""
        assert self.log_scale is not None
        scale = self.log_scale.exp()
        self.soft = scale.detach().requires_grad_()
        return scale

    def stop_learning(self) -> None:
        """Store the learned scale."""
        assert self.log_scale is not None
        self.scale.copy_(self.log_scale.detach().exp())
        self.log_scale = self.soft = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer_enabled[0]:
            self.activation_post_process(x.detach().float())
        if self.soft is not None:
            # Gradients to x and to the scale (LSQ, Esser et al. 2020, eq. 2 and 3).
            y = torch._fake_quantize_learnable_per_tensor_affine(
                x.float(), self.soft, self.zero_point.float(), self.quant_min, self.quant_max, 1.0
            )
            return y.to(x.dtype)
        if self.fake_quant_enabled[0]:
            y = torch.fake_quantize_per_tensor_affine(
                x.float(), self.scale, self.zero_point, self.quant_min, self.quant_max
            )
            return y.to(x.dtype)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return the frozen qparams, with which the fake-quantized network computed."""
        return self.scale, self.zero_point

    def merge(self, other: StaticFakeQuantize) -> None:
        """Add what another instance observed of the same tensor."""
        mine, theirs = self.activation_post_process, other.activation_post_process
        if not other.observed:
            return
        low, high = torch.minimum(mine.min_val, theirs.min_val), torch.maximum(mine.max_val, theirs.max_val)
        if hasattr(mine, "histogram"):
            total = torch.zeros_like(theirs.histogram)
            for one in (mine, theirs):
                if not torch.isinf(one.min_val).any():
                    total = mine._combine_histograms(
                        one.histogram, one.min_val, one.max_val, total, low, high
                    )
            mine.histogram = total
        mine.min_val, mine.max_val = low, high

    @property
    def observed(self) -> bool:
        """Return True if a value was observed."""
        return not bool(torch.isinf(self.activation_post_process.min_val).any())

    def freeze(self) -> None:
        """Stop observing and start quantizing. Raises TFMQError when nothing was observed."""
        if not self.observed:
            raise TFMQError(
                "calibration: an activation was never observed; run the calibration data through the prepared graph."
            )
        scale, zero_point = self.qparams_of_range()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.disable_observer()
        self.enable_fake_quant()

    def qparams_of_range(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point (1,) for what was observed."""
        observer = self.activation_post_process
        scale, zero_point = observer.calculate_qparams()
        if observer.qscheme == torch.per_tensor_symmetric:  # torchao's is one lower for unsigned
            zero_point = torch.full_like(zero_point, (self.quant_min + self.quant_max + 1) // 2)
        return scale, zero_point
