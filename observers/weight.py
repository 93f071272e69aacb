"""Weights as integers, with qparams per output channel or group, and learnable rounding (AdaRound).

Legend: R rows of K weights that share a scale and zero point: the output channels, or the groups of each in turn.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base import float8
from tfmq_fx.base._torchao import FakeQuantizeBase
from tfmq_fx.base.arithmetic import (
    Float8Range,
    IntegerRange,
    choose_qparams,
    numbers_of,
    quantize_rows,
    search_range,
)
from tfmq_fx.base.offloaded import loaded, lying_as
from tfmq_fx.graph.nodes import attribute, inline, out_dtype, set_buffer
from tfmq_fx.observers.kept_dtype import KeptDtype

GAMMA, ZETA = -0.1, 1.1  # stretch of the hard sigmoid (AdaRound, eq. 23)
# In steps: tuning starts a weight at most this far from its integer; at 0.5 its rounding would be a coin
# toss.
EDGE = 0.4


class PerChannelWeightFakeQuantize(KeptDtype, FakeQuantizeBase):  # type: ignore[misc]
    """Fake quantization that holds the integers of one weight.

    torchao passes `ch_axis` to classes with PerChannel in their name. The float weight is never written: `q`
    holds the integers, and the graph computes with (q - zero_point) * scale, bit for bit what the artefact
    dequantizes to.

    group_size: this many consecutive weights of an output channel, flattened to (C_out, C_in * kernel), form
        a row; it divides the channel. None: the channel is the row. So a convolution's groups hold as many
        weights as a linear's, at the same cost in bits, and are contiguous in memory. Groups over C_in alone
        would be `kernel` times as large.
    dtype: torch.float8_e4m3fn for numbers of that instead of integers: the row's largest magnitude is 448, and there is no
        zero point. What is said of integers here holds for them; they are not equally far apart.
    mapped: the integers lie in files that are mapped to memory, because all of them together would take too much.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        *,
        bits: int,
        ch_axis: int,
        group_size: int | None = None,
        dtype: torch.dtype | None = None,
        **_spec: Any,
    ) -> None:
        super().__init__()
        self.numbers = numbers_of(dtype, IntegerRange.weight(bits))
        self.dtype = self.numbers.dtype
        self.bits, self.ch_axis, self.group_size = bits, ch_axis, group_size
        self.mapped = False
        self.alpha: Tensor | None = None  # the soft rounding variable while it is being learned
        self.soft: Tensor | None = None  # the weight that the graph then computes with
        self._floor: Tensor | None = None
        self._step: Tensor | float = 1.0  # from there to the next number
        self.steps: Tensor | None = None  # (R, K) and (R,), while integers and scales are being tuned
        self.log_growth: Tensor | None = None
        self.register_buffer("q", torch.empty(0, dtype=self.dtype))
        self.register_buffer("scale", torch.ones(0))
        self.register_buffer("zero_point", torch.zeros(0, dtype=torch.int32))

    def initialise(self, weight: Tensor) -> None:
        """Set scales by range search (L_2.4, 80 steps) and integers by rounding to nearest.

        Numbers of float8 have the whole range: their error is relative, so that a smaller range would gain nothing.
        """
        self.dtypes = (torch.float32, weight.dtype)
        x_RK = self._float_rows(weight)
        is_float8 = isinstance(self.numbers, Float8Range)
        low_R, high_R = (x_RK.amin(1), x_RK.amax(1)) if is_float8 else search_range(x_RK, self.numbers)
        self.scale, self.zero_point = choose_qparams(low_R, high_R, self.numbers)
        q_RK = quantize_rows(x_RK, self.scale, self.zero_point, self.numbers)
        self.q = self._kept(self._unrows(q_RK, weight.shape), weight)

    def hold(self, q: Tensor) -> None:
        """Replace the integers, in the weight's shape. They are never written in place: a converted graph shares them."""
        self.q = self._kept(q, self.q)

    def _kept(self, q: Tensor, like: Tensor) -> Tensor:
        """Return integers as they are kept: offloaded like the weight or the integers before."""
        return lying_as(like, q.to(self.dtype), mapped=self.mapped)

    def _rows(self, weight: Tensor) -> Tensor:
        x_CK = weight.movedim(self.ch_axis, 0).flatten(1)
        return x_CK if self.group_size is None else x_CK.reshape(-1, self.group_size)

    def _float_rows(self, weight: Tensor) -> Tensor:
        """Return the rows of a float weight, in float32 on its device."""
        return self._rows(loaded(weight.detach()).float())

    def _unrows(self, x_RK: Tensor, shape: torch.Size) -> Tensor:
        """Invert `_rows` for a weight of that shape. The operators have an overload, for a graph to hold."""
        moved = list(range(len(shape)))
        moved.insert(0, moved.pop(self.ch_axis))
        x = torch.ops.aten.reshape.default(x_RK, [shape[i] for i in moved])
        back = [moved.index(i) for i in range(len(shape))]
        return x if self.ch_axis == 0 else torch.ops.aten.permute.default(x, back)  # type: ignore[no-any-return]

    def _stored(self) -> Tensor:
        """Return the integers as the artefact holds them: in rows for groups, else in the weight's shape."""
        return self.q if self.group_size is None else self._rows(self.q)

    def _dequantize(
        self, q: Tensor, scale_R: Tensor, zero_point_R: Tensor | None = None, **out_dtype: Any
    ) -> Tensor:
        """Dequantize what is stored. This is called here, and also traced into the converted graph."""
        axis = self.ch_axis if self.group_size is None else 0
        if isinstance(self.numbers, Float8Range):
            rank = self.q.dim() if self.group_size is None else 2
            scale = torch.ops.aten.view.default(scale_R, [-1 if i == axis else 1 for i in range(rank)])
            w = float8.dequantize(q, scale, out_dtype.get("out_dtype", torch.float32))
            return w if self.group_size is None else self._unrows(w, self.q.shape)
        limits = (self.numbers.quant_min, self.numbers.quant_max, self.dtype)
        w = torch.ops.quantized_decomposed.dequantize_per_channel.default(
            q, scale_R, zero_point_R, axis, *limits, **out_dtype
        )
        return w if self.group_size is None else self._unrows(w, self.q.shape)  # type: ignore[no-any-return]

    def dequantized(self) -> Tensor:
        return self._dequantize(self._stored(), self.scale, self.zero_point)

    def start_learning(self, weight: Tensor) -> Tensor:
        """Return a fresh alpha whose soft rounding reproduces the float weight.

        h(alpha) = frac(w / s) (AdaRound, section 3).
        """
        scaled = self._float_rows(weight) / self.scale[:, None]
        self._step = self.numbers.spacing(scaled)
        self._floor = torch.floor(scaled / self._step) * self._step
        fraction = ((scaled - self._floor) / self._step).clamp(1e-4, 1 - 1e-4)
        self.alpha = torch.logit((fraction - GAMMA) / (ZETA - GAMMA)).requires_grad_()
        self.soften()
        return self.alpha

    def soften(self) -> tuple[Tensor, Tensor]:
        """Return (weight, rounding), both functions of alpha.

        The weight is softly rounded by h(alpha) in [0, 1] (AdaRound, eq. 23). The graph computes with `soft`
        instead: a leaf, the same weight detached from alpha. Its gradient may be summed over parts of a batch
        and then passed on to alpha once.
        """
        assert self.alpha is not None
        assert self._floor is not None
        rounding = (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        zero_point = self.zero_point[:, None]
        q = (self._floor + rounding * self._step + zero_point).clamp(
            self.numbers.quant_min, self.numbers.quant_max
        )
        return self._softened(q - zero_point, self.scale), rounding

    def stop_learning(self) -> None:
        """Fix the rounding: q = floor(w / s) + [h(alpha) >= 0.5] + z."""
        assert self.alpha is not None
        assert self._floor is not None
        up = (self.alpha.detach() >= 0).to(torch.float32)  # h(0) = 0.5
        self._bake(self._floor + up * self._step + self.zero_point[:, None])
        self.alpha = self._floor = None
        self._step = 1.0

    def start_tuning(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return variables for the integers and for the scales, starting at their current values.

        steps (R, K): the weight in units of its scale, moved to within EDGE of its integer. So it rounds to
            that integer, and weights that were close to another integer are the first to move there.
        log_growth (R,): the logarithm of the factor by which the scale grows.
        """
        q_RK = self._rows(self.q.float()) - self.zero_point[:, None]
        scaled = self._float_rows(weight) / self.scale[:, None]
        edge = EDGE * self.numbers.spacing(q_RK)
        self.steps = torch.clamp(scaled, q_RK - edge, q_RK + edge).requires_grad_()
        self.log_growth = torch.zeros_like(self.scale).requires_grad_()
        return self.steps, self.log_growth

    def tuned(self) -> Tensor:
        """Return the weight as a function of the variables, rounded straight through (Bengio et al. 2013).

        `soft` gets the same weight, detached from them.
        """
        assert self.steps is not None
        assert self.log_growth is not None
        rounded = self.steps + (self.numbers.nearest(self.steps.detach()) - self.steps).detach()
        zero_point = self.zero_point[:, None]
        # At a bound, torch's clamp (2.14) passes half the gradient if the bounds are tensors, and none if
        # they are numbers: then integers at the ends of the range would stay there.
        rounded = rounded.clamp(self.numbers.quant_min - zero_point, self.numbers.quant_max - zero_point)
        return self._softened(rounded, self.scale * self.log_growth.exp())

    def stop_tuning(self) -> None:
        """Turn the variables into integers and scales."""
        assert self.steps is not None
        assert self.log_growth is not None
        self._bake(self.numbers.nearest(self.steps.detach()) + self.zero_point[:, None])
        self.scale = self.scale * self.log_growth.detach().exp()
        self.steps = self.log_growth = None

    def _softened(self, steps_RK: Tensor, scale_R: Tensor) -> Tensor:
        """Return the weight `steps_RK` steps from zero; `soft` gets the same, detached from the variables."""
        weight = self._unrows(steps_RK * scale_R[:, None], self.q.shape)
        self.soft = weight.detach().requires_grad_()
        return weight

    def _bake(self, q_RK: Tensor) -> None:
        """Store whole numbers as the integers, and let the graph compute with those again."""
        q_RK = q_RK.clamp(self.numbers.quant_min, self.numbers.quant_max)
        self.hold(self._unrows(q_RK, self.q.shape))
        self.soft = None

    def forward(self, weight: Tensor) -> Tensor:
        if not self.fake_quant_enabled[0]:
            return weight
        return (self.soft if self.soft is not None else self.dequantized()).to(weight.dtype)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def freeze(self) -> None:
        self.disable_observer()
        self.enable_fake_quant()

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the observer by a dequantization of the stored integers (torchao's hook).

        observer(weight)  ==>  dequantize_per_channel(weight_q, weight_scale, weight_zero_point)
                               to(weight_q, float32) * view(weight_scale)                         in float8
                               reshape(dequantize_per_channel(weight_q, ..), weight's shape)      with groups
        """
        source = node.args[0]
        assert isinstance(source, Node)
        graph, path = model.graph, str(source.target)
        with graph.inserting_before(node):
            parts = []
            stored = {"q": self._stored(), "scale": self.scale.clone(), "zero_point": self.zero_point.clone()}
            if isinstance(self.numbers, Float8Range):
                del stored["zero_point"]
            for name, value in stored.items():
                # The float weight keeps `path` until it is dropped as unused, so its integers need other
                # names.
                set_buffer(model, f"{path}_{name}", value)
                parts.append(graph.get_attr(f"{path}_{name}"))
            kept = out_dtype(attribute(model, path).dtype)
            y = inline(graph, partial(self._dequantize, **kept), *parts)
            y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
