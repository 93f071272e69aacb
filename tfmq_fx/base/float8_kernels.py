"""Linears of float8_e4m3fn on a GPU's tensor cores, as a graph operator.

    tfmq::float8_linear    x (..., C_in) -> (..., C_out)

    y = sum(x * w) * scale * row_scale + bias

x (..., C_in) and weight (N, K) are float8_e4m3fn, with C_in and C_out padded by zeros to N and K, multiples of 16; see `stored`.
scale (N,) float32: of each output channel. row_scale: one for each of the leading dimensions that it has, such as (B, 1, 1) for
scales by timestep or (B, L, 1) by token. bias (N,). dtype: of y, which has all N channels.

torch.compile and AOTInductor see the aten._scaled_mm in it. In bfloat16, that has all scales and the bias in its
epilogue. Its sums are then those of the tensor cores, of some 14 bits, which is more than y holds. In other dtypes the sums are
of float32, and the rest is separate. CPUs, whose _scaled_mm takes no scales for rows before torch 2.15, compute in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tfmq_fx.base import float8

MULTIPLE = 16  # bytes: what _scaled_mm asks of both sizes of a weight
LEAST = (8, 9)  # compute capability: Ada, Hopper


def padded(x: Tensor, *sizes: int) -> Tensor:
    """Return x with zeros at the ends of its last dimensions, which then have these sizes."""
    missing = [n - have for n, have in zip(sizes, x.shape[-len(sizes) :], strict=True)]
    if not any(missing):
        return x
    pads = [side for n in reversed(missing) for side in (0, n)]
    # torch pads no float8 everywhere, but bytes; the bits of 0.0 are those of 0
    return F.pad(x.view(torch.uint8), pads).view(x.dtype) if x.dtype == float8.DTYPE else F.pad(x, pads)


def stored(weight: Tensor) -> Tensor:
    """Return a weight (C_out, C_in) of numbers that float8 holds exactly, in float8, padded to multiples of 16."""
    return padded(weight.to(float8.DTYPE), *(-(-n // MULTIPLE) * MULTIPLE for n in weight.shape)).contiguous()


@torch.library.triton_op("tfmq::float8_linear", mutates_args=())
def float8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply; see the module."""
    leading = x.shape[:-1]
    x = padded(x, weight.shape[1]).reshape(-1, weight.shape[1]).contiguous()
    by_row = None if row_scale is None else row_scale.float().expand(*leading, 1).reshape(-1, 1)
    if x.is_cuda and dtype == torch.bfloat16:  # the only dtype in which _scaled_mm has scales for rows
        scale_a = x.new_ones((x.shape[0], 1), dtype=torch.float32) if by_row is None else by_row.contiguous()
        b = None if bias is None else bias.to(dtype)
        y = torch._scaled_mm(
            x, weight.t(), scale_a, scale[None], bias=b, out_dtype=dtype, use_fast_accum=True
        )
        return y.reshape(*leading, -1)
    y = _sums(x, weight) * scale
    y = y if by_row is None else y * by_row
    y = y if bias is None else y + bias
    return y.to(dtype).reshape(*leading, -1)


def _sums(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight^T in float32."""
    if not x.is_cuda:
        return (x.double() @ weight.double().t()).float()
    one = x.new_ones((), dtype=torch.float32)
    return torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.float32)


@float8_linear.register_fake
def _fake(x, weight, scale, row_scale, bias, dtype):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
