"""The second term of an activation that is a sum of two integer tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base._torchao import FakeQuantizeBase
from tfmq_fx.base.arithmetic import IntegerRange, choose_qparams
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import dtype_of, out_dtype
from tfmq_fx.observers.kept_dtype import KeptDtype


class ResidualFakeQuantize(KeptDtype, FakeQuantizeBase):  # type: ignore[misc]
    """Fake quantization of what the rounding of x to its whole range leaves: |r| <= scale / 2.

    High-order residual quantization (Li et al. 2017, eq. 10) with integers: x = q_1(x) + q_2(x - q_1(x)). Two terms of b
    bits have the precision of 2 b bits, in kernels for b bits.

    The module is called with (r, x). It observes x, because r is 0 while nothing is rounded.
    """

    min_val: Tensor
    max_val: Tensor
    scale: Tensor

    def __init__(self, *, bits: int = 8) -> None:
        super().__init__()
        self.whole, self.integers = IntegerRange.activation(bits), IntegerRange.operand(bits)
        self.dtype = self.integers.dtype
        self.register_buffer("min_val", torch.tensor(torch.inf))
        self.register_buffer("max_val", torch.tensor(-torch.inf))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.full((1,), 2 ** (bits - 1), dtype=torch.int32))

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def merge(self, other: ResidualFakeQuantize) -> None:
        """Add what another instance observed of the same tensor."""
        self.min_val = torch.minimum(self.min_val, other.min_val)
        self.max_val = torch.maximum(self.max_val, other.max_val)

    def freeze(self) -> None:
        """Stop observing and start quantizing. Raises TFMQError when nothing was observed."""
        if torch.isinf(self.min_val):
            raise TFMQError(
                "calibration: an activation was never observed; run the calibration data through the prepared graph."
            )
        scale, _ = choose_qparams(self.min_val[None], self.max_val[None], self.whole)
        # r is within half a step of the first term.
        self.scale.copy_(scale / (self.integers.quant_max - self.integers.quant_min))
        self.disable_observer()
        self.enable_fake_quant()

    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        if self.observer_enabled[0]:
            self.min_val = torch.minimum(self.min_val, x.detach().amin().float())
            self.max_val = torch.maximum(self.max_val, x.detach().amax().float())
        if self.fake_quant_enabled[0]:
            limits = (self.integers.quant_min, self.integers.quant_max)
            y = torch.fake_quantize_per_tensor_affine(r.float(), self.scale, self.zero_point, *limits)
            r = y.to(r.dtype)
        return r

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the observer by a standard quantize/dequantize pair (torchao's hook)."""
        r, _ = node.args
        assert isinstance(r, Node)
        ops, integers = torch.ops.quantized_decomposed, self.integers
        limits = (integers.quant_min, integers.quant_max, integers.dtype)
        arguments = (float(self.scale), int(self.zero_point), *limits)
        with model.graph.inserting_before(node):
            q = model.graph.call_function(ops.quantize_per_tensor.default, (r, *arguments))
            y = model.graph.call_function(
                ops.dequantize_per_tensor.default, (q, *arguments), out_dtype(dtype_of(r))
            )
            y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        model.graph.erase_node(node)
