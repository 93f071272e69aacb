"""Weights: per-output-channel integers, with a rounding that can be learned (AdaRound)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx._torchao import FakeQuantizeBase
from tfmq_fx.arithmetic import IntegerRange, choose_qparams, dequantize_rows, quantize_rows, search_range
from tfmq_fx.graph import set_buffer

GAMMA, ZETA = -0.1, 1.1  # stretch of the hard sigmoid (AdaRound, eq. 23)


class PerChannelWeightFakeQuantize(FakeQuantizeBase):  # type: ignore[misc]
    """The integers of one weight. torchao passes `ch_axis` to classes called PerChannel.

    The float weight is never written: `q` holds the integers, and what the graph computes with is
    (q - zero_point) * scale, bit for bit what the artefact dequantizes to.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, *, bits: int, ch_axis: int, **_spec: Any) -> None:
        super().__init__()
        self.integers = IntegerRange.weight(bits)
        self.dtype = self.integers.dtype
        self.bits, self.ch_axis = bits, ch_axis
        self.alpha: Tensor | None = None  # the soft rounding variable while it is being learned
        self.soft: Tensor | None = None  # the weight that the graph then computes with
        self._floor: Tensor | None = None
        self.register_buffer("q", torch.empty(0, dtype=self.dtype))
        self.register_buffer("scale", torch.ones(0))
        self.register_buffer("zero_point", torch.zeros(0, dtype=torch.int32))

    def initialise(self, weight: Tensor) -> None:
        """Scales by range search (L_2.4, 80 steps), integers by rounding to nearest."""
        x_CK = weight.detach().float().movedim(self.ch_axis, 0).flatten(1)
        self.scale, self.zero_point = choose_qparams(*search_range(x_CK, self.integers), self.integers)
        self.q = quantize_rows(
            weight.detach().float(), self.scale, self.zero_point, self.integers, self.ch_axis
        )

    def _per_channel(self, x_C: Tensor, weight: Tensor) -> Tensor:
        shape = [1] * weight.dim()
        shape[self.ch_axis] = -1
        return x_C.view(shape)

    def dequantized(self) -> Tensor:
        return dequantize_rows(self.q, self.scale, self.zero_point, self.integers, self.ch_axis)

    def start_learning(self, weight: Tensor) -> Tensor:
        """A fresh alpha whose soft rounding reproduces the float weight: h(alpha) = frac(w / s) (AdaRound, section 3)."""
        scaled = weight.detach().float() / self._per_channel(self.scale, weight)
        self._floor = torch.floor(scaled)
        fraction = (scaled - self._floor).clamp(1e-4, 1 - 1e-4)
        self.alpha = torch.logit((fraction - GAMMA) / (ZETA - GAMMA)).requires_grad_()
        self.soften()
        return self.alpha

    def soften(self) -> tuple[Tensor, Tensor]:
        """(weight, rounding), both functions of alpha: the weight softly rounded by h(alpha) in [0, 1] (AdaRound, eq. 23).

        The graph computes with `soft` instead: a leaf, the same weight cut off from alpha. Its gradient may be
        summed over parts of a batch before it goes on, once, to alpha.
        """
        assert self.alpha is not None
        assert self._floor is not None
        rounding = (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        zero_point = self._per_channel(self.zero_point, self._floor)
        q = (self._floor + rounding + zero_point).clamp(self.integers.quant_min, self.integers.quant_max)
        weight = (q - zero_point) * self._per_channel(self.scale, self._floor)
        self.soft = weight.detach().requires_grad_()
        return weight, rounding

    def stop_learning(self) -> None:
        """Bake the rounding: q = floor(w / s) + [h(alpha) >= 0.5] + z."""
        assert self.alpha is not None
        assert self._floor is not None
        up = (self.alpha.detach() >= 0).to(torch.float32)  # h(0) = 0.5
        q = self._floor + up + self._per_channel(self.zero_point, self._floor)
        self.q = q.clamp(self.integers.quant_min, self.integers.quant_max).to(self.dtype)
        self.alpha = self.soft = self._floor = None

    def forward(self, weight: Tensor) -> Tensor:
        if not self.fake_quant_enabled[0]:
            return weight
        return self.soft if self.soft is not None else self.dequantized().to(weight.dtype)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def freeze(self) -> None:
        self.disable_observer()
        self.enable_fake_quant()

    def convert(self, model: GraphModule, node: Node) -> None:
        """torchao's convert hook.

        observer(weight)  ==>  dequantize_per_channel(weight.q, weight.scale, weight.zero_point)
        """
        source = node.args[0]
        assert isinstance(source, Node)
        graph, path = model.graph, str(source.target)
        with graph.inserting_before(node):
            parts = []
            for name in ("q", "scale", "zero_point"):
                # The float weight keeps `path`; its integers live beside it until it is dropped as unused.
                set_buffer(model, f"{path}_{name}", self.get_buffer(name).clone())
                parts.append(graph.get_attr(f"{path}_{name}"))
            q, scale, zero_point = parts
            y = graph.call_function(
                torch.ops.quantized_decomposed.dequantize_per_channel.default,
                (
                    q,
                    scale,
                    zero_point,
                    self.ch_axis,
                    self.integers.quant_min,
                    self.integers.quant_max,
                    self.dtype,
                ),
            )
            y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
