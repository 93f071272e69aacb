"""One scale per tensor for numbers of float8_e4m3fn: the inputs of linear layers outside the temporal block."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base import float8
from tfmq_fx.base.arithmetic import Float8Range, choose_qparams, fake_quantize_rows, search_range
from tfmq_fx.graph.nodes import dtype_of, inline
from tfmq_fx.observers.static import StaticFakeQuantize


class Float8FakeQuantize(StaticFakeQuantize):
    """Fake quantization to float8_e4m3fn, with torchao's observers for the range: its largest magnitude becomes 448.

    With torchao's histogram observer, the range is the one of least squared error over the histogram.
    """

    def __init__(self, *, observer: Any, **_spec: Any) -> None:
        super().__init__(observer=observer, dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
        self.numbers = Float8Range()
        self.dtype = self.numbers.dtype
        self.quant_min, self.quant_max = self.numbers.quant_min, self.numbers.quant_max

    def forward(self, x: Tensor) -> Tensor:
        if self.observer_enabled[0]:
            self.activation_post_process(x.detach().float())
        if self.soft is not None:
            # Gradients to x and to the scale (LSQ, Esser et al. 2020, eq. 2 and 3).
            scaled = (x.float() / self.soft).clamp(self.quant_min, self.quant_max)
            rounded = scaled + (self.numbers.nearest(scaled.detach()) - scaled).detach()
            return (rounded * self.soft).to(x.dtype)
        if self.fake_quant_enabled[0]:
            y = fake_quantize_rows(x.reshape(1, -1), self.scale, self.zero_point, self.numbers)
            return y.reshape(x.shape)
        return x

    def qparams_of_range(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point (1,) for what was observed."""
        observer = self.activation_post_process
        low, high = observer.min_val.reshape(1), observer.max_val.reshape(1)
        if hasattr(observer, "histogram"):
            low, high = self._least_error(observer.histogram, low, high)
        return choose_qparams(low, high, self.numbers)

    def _least_error(self, histogram: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range within [low, high] of least squared error, each bin's values counted in its middle."""
        bins = len(histogram)
        middles = low + (high - low) * (torch.arange(bins, device=low.device) + 0.5) / bins
        return search_range(middles[None], self.numbers, p=2.0, weight_K=histogram)

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the observer by a cast to float8 and back, scaled by a literal (torchao's hook). Bitwise unchanged.

        observer(x)  ==>  to(to(clamp(x * (1 / s), -448, 448), float8), float32) * s
        """
        x = node.args[0]
        assert isinstance(x, Node)
        scale, dtype = float(self.scale), dtype_of(x)
        with model.graph.inserting_before(node):
            y = inline(model.graph, partial(_rounded, scale=scale, dtype=dtype), x)
            y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        model.graph.erase_node(node)


def _rounded(x: Any, *, scale: float, dtype: torch.dtype) -> Any:
    return float8.dequantize(float8.quantize(x, scale), scale, dtype)
