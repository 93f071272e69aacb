"""One scale per token, computed at run time: the inputs of linear layers outside the temporal block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base._torchao import FakeQuantizeBase
from tfmq_fx.base.arithmetic import IntegerRange, fake_quantize_tokens, numbers_of, quantize_tokens
from tfmq_fx.graph.nodes import dtype_of, inline
from tfmq_fx.observers.kept_dtype import KeptDtype


class TokenFakeQuantize(KeptDtype, FakeQuantizeBase):  # type: ignore[misc]
    """Fake quantization with a symmetric scale per token, which needs no calibration.

    A token is an index into all dimensions but the last. dtype: torch.float8_e4m3fn for numbers of that, not integers.
    """

    def __init__(self, *, bits: int, dtype: torch.dtype | None = None, **_spec: Any) -> None:
        super().__init__()
        self.numbers = numbers_of(dtype, IntegerRange.token(bits))
        self.dtype = self.numbers.dtype

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize_tokens(x, self.numbers) if self.fake_quant_enabled[0] else x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("scales per token are computed at run time")

    def freeze(self) -> None:
        self.disable_observer()
        self.enable_fake_quant()

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the observer by operators that compute the scales (torchao's hook). Bitwise unchanged.

        observer(x)  ==>  s, z = max |x| / quant_max, 0;  dequantize_per_token(quantize_per_token(x, s, z), s, z)
        """
        x = node.args[0]
        assert isinstance(x, Node)
        with model.graph.inserting_before(node):
            dtype = dtype_of(x)
            y = inline(model.graph, lambda x: quantize_tokens(x, self.numbers, dtype), x)
            y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        model.graph.erase_node(node)
