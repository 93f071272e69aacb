"""One Triton kernel for int8 convolutions and linears on NVIDIA's tensor cores, with everything that follows a sum.

It is an implicit matrix product: an output pixel is a row, an output channel a column, and the sum runs over the taps of
the window and the input channels. A linear is a window of one tap.

    sum[m, n] = sum over taps and channels of x * w          int8 * int8 -> int32, exact
    v = (sum - correction[n]) * scale[n] * row_scale[m] + bias[n] + residual[m, n]
    y = activation(v) * y_factor[m]                          a float, or the nearest byte of y / y_scale + y_zero_point

Legend: rows M = N * OH * OW, columns = C_out. Memory: x and y NHWC, weight (C_out, KH, KW, C_in).

It calls no other function of Triton's library than builtins, so that `InterpretedFunction(int8_product.fn)` runs it on a
CPU, whatever was set when Triton was imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

GROUP = 8  # tiles of rows whose programs follow each other, so that they share the weights in the L2 cache


@triton.jit  # type: ignore[untyped-decorator]
def int8_product(  # type: ignore[no-untyped-def]
    x, weight, weight_zero, scale, correction, bias, row_scale, residual, y_factor, y,
    rows, columns, channels, height, width, out_height, out_width, rows_per_scale, rows_per_factor,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    residual_n, residual_h, residual_w, residual_c, y_inverse, y_zero_point,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, POINTWISE: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr,
    CORRECTION: tl.constexpr, BIAS: tl.constexpr, ROW_SCALE: tl.constexpr, RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr, ACTIVATION: tl.constexpr, BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m = (rows + BLOCK_M - 1) // BLOCK_M
    tiles_n = (columns + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    grouped = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    row = (first + within % grouped) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // grouped * BLOCK_N + tl.arange(0, BLOCK_N)
    real = column < columns
    stored = (row < rows)[:, None] & real[None, :]
    # What lies beyond the edge sums the last row or column once more, and is not stored: the loop needs no mask for it.
    row = tl.minimum(row, rows - 1)
    last = tl.minimum(column, columns - 1)

    image = row // (out_height * out_width)
    out_h = row // out_width % out_height
    out_w = row % out_width
    # x holds the channels of the packed weight's low and high halves, one behind the other
    pitch = channels * 2 if PACKED else channels
    x_row = row.to(tl.int64) * pitch if POINTWISE else image.to(tl.int64) * (height * width) * pitch
    top = out_h * stride_h - padding_h
    left = out_w * stride_w - padding_w
    weight_row = last.to(tl.int64) * (TAPS_H * TAPS_W) * channels
    if PACKED:
        zero = tl.load(weight_zero + last)[None, :]

    total = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    blocks = (channels + BLOCK_K - 1) // BLOCK_K
    for step in range(0, TAPS_H * TAPS_W * blocks):
        tap = step // blocks
        channel = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        if POINTWISE:
            x_at = x + x_row[:, None] + channel[None, :]
            seen = (channel < channels)[None, :]
        else:
            h = top + tap // TAPS_W * dilation_h
            w = left + tap % TAPS_W * dilation_w
            x_at = x + x_row[:, None] + ((h * width + w) * pitch)[:, None] + channel[None, :]
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            seen = inside[:, None] if EVEN else inside[:, None] & (channel < channels)[None, :]
        weight_at = weight + weight_row[None, :] + tap * channels + channel[:, None]
        b = tl.load(weight_at) if EVEN else tl.load(weight_at, mask=(channel < channels)[:, None], other=0)
        a = tl.load(x_at) if POINTWISE and EVEN else tl.load(x_at, mask=seen, other=0)
        if PACKED:
            low = (b & 15).to(tl.int8) - zero
            total = tl.dot(a, low, total, out_dtype=tl.int32)
            x_at += channels
            a = tl.load(x_at) if POINTWISE and EVEN else tl.load(x_at, mask=seen, other=0)
            high = (b >> 4).to(tl.int8) - zero
            total = tl.dot(a, high, total, out_dtype=tl.int32)
        else:
            total = tl.dot(a, b, total, out_dtype=tl.int32)

    if CORRECTION:
        total -= tl.load(correction + column, mask=real, other=0)[None, :]
    v = total.to(tl.float32) * tl.load(scale + column, mask=real, other=0)[None, :]
    if ROW_SCALE:
        v *= tl.load(row_scale + row // rows_per_scale).to(tl.float32)[:, None]
    if BIAS:
        v += tl.load(bias + column, mask=real, other=0).to(tl.float32)[None, :]
    if RESIDUAL:
        residual_row = (
            image.to(tl.int64) * residual_n
            + out_h.to(tl.int64) * residual_h
            + out_w.to(tl.int64) * residual_w
        )
        at = residual + residual_row[:, None] + column.to(tl.int64)[None, :] * residual_c
        v += tl.load(at, mask=stored, other=0).to(tl.float32)
    if ACTIVATION == 1:  # silu
        v = v / (1.0 + tl.exp(-v))
    elif ACTIVATION == 2:  # gelu
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == 3:  # gelu by tanh(u) = 1 - 2 / (1 + exp(2 u))
        v = v - v / (1.0 + tl.exp(1.5957691216057308 * (v + 0.044715 * v * v * v)))
    if FACTOR:
        v *= tl.load(y_factor + row // rows_per_factor).to(tl.float32)[:, None]
    if BYTES:
        v = v * y_inverse
        v = tl.minimum(tl.maximum(v, -128.0 - y_zero_point), 127.0 - y_zero_point)
        v = (
            (v + 12582912.0) - 12582912.0 + y_zero_point
        )  # 1.5 * 2^23: the sum rounds to an integer, ties to even
    at = y + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, v.to(y.dtype.element_ty), mask=stored)


ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


def launch(
    x: Tensor,
    weight: Tensor,
    weight_zero: Tensor | None,
    scale: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    y_factor: Tensor | None,
    y: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    tile: Sequence[int],
    y_scale: float,
    y_zero_point: int,
    wrap: Callable[[Any], Any] = wrap_triton,
) -> None:
    """Fill y (N, OH, OW, C_out) from x (N, H, W, C_in), both contiguous; see the module.

    weight: (C_out, KH, KW, C_in) int8; or, with `weight_zero`, (C_out, KH, KW, C_in / 2) bytes of two integers each.
    residual: as y, with any strides. tile: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages. wrap: makes a kernel launchable.
    """
    _, height, width, _ = x.shape
    images, out_height, out_width, columns = y.shape
    rows = images * out_height * out_width
    _, taps_h, taps_w, channels = weight.shape
    block_m, block_n, block_k, warps, stages = tile
    pointwise = taps_h == taps_w == 1 and list(stride) == [1, 1] and list(padding) == [0, 0]
    programs = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
    # A kernel takes a tensor for what is left out, too, and does not read it.
    wrap(int8_product)[(programs,)](
        x, weight, *(scale if t is None else t for t in (weight_zero,)), scale,
        *(scale if t is None else t for t in (correction, bias, row_scale, residual, y_factor)), y,
        rows, columns, channels, height, width, out_height, out_width,
        1 if row_scale is None else rows // row_scale.numel(),
        1 if y_factor is None else rows // y_factor.numel(),
        *stride, *padding, *dilation, *((0, 0, 0, 0) if residual is None else residual.stride()),
        1.0 / y_scale, float(y_zero_point),
        TAPS_H=taps_h, TAPS_W=taps_w, POINTWISE=pointwise, EVEN=channels % block_k == 0, PACKED=weight_zero is not None,
        CORRECTION=correction is not None, BIAS=bias is not None, ROW_SCALE=row_scale is not None,
        RESIDUAL=residual is not None, FACTOR=y_factor is not None, ACTIVATION=ACTIVATIONS[activation],
        BYTES=y.dtype == torch.int8, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
