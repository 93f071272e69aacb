"""int8 products by cuDNN, with everything that follows a sum in the same kernel, where its Python frontend is installed.

`pip install nvidia-cudnn-frontend`. The operator here is opaque to torch.compile, and is recorded in a CUDA graph as any other
kernel. A product's graph is built when its shape comes first, and kept; cuDNN may offer several plans for it, of which the
first is usually the fastest. The numbers are those of `int8_kernels`, but for the order in which float32 products and sums round.

Legend: NHWC pictures, as in `triton_int8`. A linear is a picture of one row of pixels.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.base.errors import TFMQError, first_line

PLANS = 2  # that are worth measuring
_lock = threading.Lock()
_own = threading.local()  # a handle belongs to one thread at a time


@functools.cache
def frontend() -> Any:
    """Return cuDNN's Python frontend; None where it is not installed or cannot be loaded."""
    try:
        import cudnn  # type: ignore[import-not-found, unused-ignore]
    except Exception:  # of its own libraries, which may be missing or too old
        return None
    return cudnn


@torch.library.custom_op("tfmq::cudnn_product", mutates_args=())
def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    y_factor: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    plan: int,
    y_scale: float,
    y_zero_point: int,
) -> Tensor:
    """Return y (N, OH, OW, C_out) of this shape and dtype, from x (N, H, W, C_in), contiguous, and weight (C_out, KH, KW, C_in).

    The rest as in `triton_int8.launch`. plan: which of cuDNN's plans. What belongs to channels is best given in float32, which
    is what cuDNN takes: a call casts the rest. Raises TFMQError where cuDNN has no such plan.
    """
    y = x.new_empty(shape, dtype=dtype)
    given = {
        "x": x.permute(0, 3, 1, 2),
        "weight": weight.permute(0, 3, 1, 2),
        "scale": _by_channel(scale),
        "correction": _by_channel(correction),
        "row_scale": _by_row(row_scale, y),
        "bias": _by_channel(bias),
        "residual": None if residual is None else residual.permute(0, 3, 1, 2),
        "y_factor": _by_row(y_factor, y),
        "y": y.permute(0, 3, 1, 2),
    }
    if y.dtype == torch.int8:
        step, zero = _constants(y_scale, y_zero_point, x.device)
        given |= {"step": step, "zero": zero}
    tensors = {n: t for n, t in given.items() if t is not None}
    forms = tuple((n, t.shape, t.stride(), t.dtype) for n, t in tensors.items())
    place = (tuple(padding), tuple(stride), tuple(dilation))
    with _lock:
        built = _built(forms, place, activation, plan, x.device)
    built.run(tensors, _handle(x.device))
    return y


@product.register_fake
def _fake(x, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(rest[7], dtype=rest[8])


def _by_channel(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().reshape(1, -1, 1, 1)


def _by_row(t: Tensor | None, y: Tensor) -> Tensor | None:
    """Return one number for each picture, line or pixel of y (N, OH, OW, C), as (N, 1, OH or 1, OW or 1)."""
    if t is None:
        return None
    n, h, w, _ = y.shape
    if t.numel() < n:
        t = t[:, None].expand(-1, n // t.numel()).flatten()
    shape = {n: (n, 1, 1, 1), n * h: (n, 1, h, 1), n * h * w: (n, 1, h, w)}[t.numel()]
    return t.float().reshape(shape)


@functools.cache
def _constants(y_scale: float, y_zero_point: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what a float is multiplied by and then moved by to become a byte, kept: a CUDA graph reads them at each replay."""
    values = (1.0 / y_scale, float(y_zero_point))
    step, zero = (torch.full((1, 1, 1, 1), v, device=device) for v in values)
    return step, zero


@dataclass(frozen=True, kw_only=True)
class _Built:
    """A graph of cuDNN with one plan, and the names of its tensors."""

    graph: Any
    tensors: dict[str, Any]
    plan: int
    workspace: int

    def run(self, tensors: dict[str, Tensor], handle: Any) -> None:
        device = tensors["x"].device
        space = torch.empty(max(self.workspace, 1), dtype=torch.uint8, device=device)
        pack = {own: tensors[name] for name, own in self.tensors.items()}
        self.graph.execute_plan_at_index(pack, space, self.plan, handle=handle)


def _handle(device: torch.device) -> Any:
    """Return this thread's handle for a device, on the current stream."""
    cudnn = frontend()
    handles: dict[torch.device, Any] = _own.__dict__.setdefault("handles", {})
    if device not in handles:
        handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle=handles[device], stream=torch.cuda.current_stream(device).cuda_stream)
    return handles[device]


@functools.cache
def _built(
    forms: tuple[Any, ...], place: tuple[Any, ...], activation: str, plan: int, device: torch.device
) -> _Built:
    """Return the graph of a product. forms: name, shape, strides and dtype of each tensor."""
    cudnn = frontend()
    if cudnn is None:
        raise TFMQError("cuDNN's Python frontend is not installed; pip install nvidia-cudnn-frontend.")
    kinds = cudnn.data_type
    dtypes = {
        torch.int8: kinds.INT8, torch.float32: kinds.FLOAT, torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF,
    }  # fmt: skip
    try:
        graph = cudnn.pygraph(
            handle=_handle(device), intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT
        )
        own = {
            n: graph.tensor(name=n, dim=list(shape), stride=list(strides), data_type=dtypes[dtype])
            for n, shape, strides, dtype in forms
            if n != "y"
        }
        padding, stride, dilation = map(list, place)
        sums = graph.conv_fprop(
            image=own["x"], weight=own["weight"], padding=padding, stride=stride, dilation=dilation,
            compute_data_type=kinds.INT32,
        )  # fmt: skip
        sums.set_data_type(kinds.INT32)
        y = _epilogue(graph, sums, own, activation)
        _, shape, strides, dtype = next(form for form in forms if form[0] == "y")
        y.set_output(True).set_data_type(dtypes[dtype]).set_dim(list(shape)).set_stride(list(strides))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plan_at_index(plan)
        workspace = graph.get_workspace_size_plan_at_index(plan)
    except Exception as error:  # cuDNN's own types
        raise TFMQError(f"cuDNN has no plan {plan} for this product: {first_line(error)}") from error
    return _Built(graph=graph, tensors={**own, "y": y}, plan=plan, workspace=workspace)


def _epilogue(graph: Any, sums: Any, own: dict[str, Any], activation: str) -> Any:
    """Add what follows a sum to cuDNN's graph, and return the result."""
    v = sums
    steps = (
        ("correction", graph.sub), ("scale", graph.mul), ("row_scale", graph.mul), ("bias", graph.add), ("residual", graph.add),
    )  # fmt: skip
    for name, operation in steps:
        v = operation(a=v, b=own[name]) if name in own else v
    activations = {"silu": graph.swish, "gelu": graph.gelu, "gelu_tanh": graph.gelu_approx_tanh}
    v = activations[activation](v) if activation in activations else v
    for name, operation in (("y_factor", graph.mul), ("step", graph.mul), ("zero", graph.add)):
        v = operation(a=v, b=own[name]) if name in own else v
    return v
