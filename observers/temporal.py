"""The base of all observers keyed on timestep: one (scale, zero_point) per timestep, or per key with it."""

from __future__ import annotations

from abc import abstractmethod
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
    choose_shared_qparams,
    fake_quantize_rows,
    numbers_of,
)
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import dtype_of, inline, meta_value, out_dtype, set_buffer
from tfmq_fx.observers.kept_dtype import KeptDtype


class TemporalObserver(KeptDtype, FakeQuantizeBase):  # type: ignore[misc]
    """A base for finite set calibration (TFMQ-DM, FSC): x is quantized with its own timestep's qparams.

    To add an estimator, subclass and define two methods; pass the class as `Recipe(temporal_observer=...)`:

        observe(x_NF, step_N)   accumulate. Observing A, then B, must equal observing A and B together.
        ranges()                return the (min_T, max_T) to cover, for the keys that were observed.
        merge(other)            optional: add what `other` observed, as if one observer had seen both; call
                                super().merge(other) too.

    In the prepared graph the module is called with (x, step): x (N, ...) and step (N,) int64, indices into the
    T = `num_keys` values of its key, computed once in the graph. The key is the timestep of the schedule, or its
    product with other finite inputs that x depends on. A batch may mix keys.

    shared_zero_point: give all keys the same zero point, so that a scale per key costs an int8 kernel only
        one multiplication.
    dtype: torch.float8_e4m3fn for numbers of that, which have no zero point; integers otherwise.
    """

    seen: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        *,
        num_keys: int,
        bits: int = 8,
        shared_zero_point: bool = False,
        dtype: torch.dtype | None = None,
        **_spec: Any,
    ) -> None:
        super().__init__()  # _spec: what else torchao passes on from the QuantizationSpec
        self.numbers = numbers_of(dtype, IntegerRange.activation(bits))
        self.dtype = self.numbers.dtype
        self.num_keys, self.shared_zero_point = num_keys, shared_zero_point
        # False when the key was captured with shape (): one row of qparams then serves the whole tensor.
        self.per_sample = True
        self.register_buffer("seen", torch.zeros(num_keys, dtype=torch.bool))
        self.register_buffer("scale", torch.ones(num_keys))
        self.register_buffer("zero_point", torch.zeros(num_keys, dtype=torch.int32))

    @abstractmethod
    def observe(self, x_NF: Tensor, step_N: Tensor) -> None: ...

    @abstractmethod
    def ranges(self) -> tuple[Tensor, Tensor]: ...

    def merge(self, other: TemporalObserver) -> None:
        """Add what `other`, of the same class, observed. Optional: without it, one thread sees all data."""
        self.seen |= other.seen

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point), each (T,). Raises TFMQError when a timestep was never observed."""
        if not self.seen.all():
            missing = (~self.seen).nonzero().flatten().tolist()
            raise TFMQError(
                f"calibration: {len(missing)} of {self.num_keys} timesteps (or keys with them) were never observed "
                f"(step indices {missing[:8]}); every value must occur in the calibration data."
            )
        choose = choose_shared_qparams if self.shared_zero_point else choose_qparams
        return choose(*self.ranges(), self.numbers)

    def freeze(self) -> None:
        """Stop observing and start quantizing with the qparams found."""
        scale, zero_point = self.calculate_qparams()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.disable_observer()
        self.enable_fake_quant()

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        if self.observer_enabled[0]:
            rows = x.detach().float()
            self.observe(rows.flatten(1) if self.per_sample else rows.reshape(1, -1), step)
            self.seen[step] = True
        if self.fake_quant_enabled[0]:
            flat = x if self.per_sample else x[None]
            y = fake_quantize_rows(flat, self.scale[step], self.zero_point[step], self.numbers)
            x = y if self.per_sample else y[0]
        return x

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the observer by a table lookup and a standard quantize/dequantize pair (torchao's hook).

            observer(x, step)  ==>  s, z = scale[step], zero_point[step];  dequantize(quantize(x, s, z), s, z)
                                    s = scale[step];  to(to(clamp(x / s), float8), float32) * s      in float8

        With a key per sample, the pair is the per-channel one on the batch axis, which makes mixed timesteps
        correct.
        """
        x, step = node.args
        assert isinstance(x, Node)
        graph = model.graph
        with graph.inserting_before(node):
            y = (
                self._float8(model, x, step)
                if isinstance(self.numbers, Float8Range)
                else self._pair(model, x, step)
            )
            y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        graph.erase_node(node)

    def _row(self, model: GraphModule, x: Node, step: Any, name: str) -> Node:
        """Return the node that looks up qparams, "scale" or "zero_point", by the step."""
        path = f"{x.name}_by_timestep.{name}"
        set_buffer(model, path, getattr(self, name).clone())
        table = model.graph.get_attr(path)
        return model.graph.call_function(torch.ops.aten.index_select.default, (table, 0, step))

    def _pair(self, model: GraphModule, x: Node, step: Any) -> Node:
        ops, numbers = torch.ops.quantized_decomposed, self.numbers
        qparams = [self._row(model, x, step, name) for name in ("scale", "zero_point")]
        limits: tuple[Any, ...] = (numbers.quant_min, numbers.quant_max, numbers.dtype)
        if self.per_sample:
            arguments: tuple[Any, ...] = (*qparams, 0, *limits)
            quantize, dequantize = ops.quantize_per_channel.default, ops.dequantize_per_channel.default
        else:
            arguments = (*qparams, *limits)
            quantize, dequantize = ops.quantize_per_tensor.tensor, ops.dequantize_per_tensor.tensor
        q = model.graph.call_function(quantize, (x, *arguments))
        return model.graph.call_function(dequantize, (q, *arguments), out_dtype(dtype_of(x)))

    def _float8(self, model: GraphModule, x: Node, step: Any) -> Node:
        value, dtype = meta_value(x), dtype_of(x)
        if self.per_sample and not isinstance(value, Tensor):
            raise TFMQError(
                f"node {x.name}: its shape is unknown, and float8 needs its rank; capture the network with tfmq_fx.capture."
            )
        rank = value.dim() if self.per_sample else 1

        def rounded(x: Any, scale_N: Any) -> Any:
            scale = torch.ops.aten.view.default(scale_N, [-1] + [1] * (rank - 1))
            return float8.dequantize(float8.quantize(x, scale), scale, dtype)

        return inline(model.graph, rounded, x, self._row(model, x, step, "scale"))
