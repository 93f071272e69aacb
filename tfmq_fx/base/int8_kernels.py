"""int8 convolutions and linears for GPUs as graph operators, with everything that follows a sum.

    tfmq::int8_conv2d    x (N, C_in, H, W)  -> (N, C_out, OH, OW), in channels-last memory
    tfmq::int8_linear    x (..., C_in)      -> (..., C_out)

    v = (sum(x * w) - correction) * scale * row_scale + bias + residual
    y = activation(v) * y_factor                             a float, or the nearest byte of y / y_scale + y_zero_point

x and w are signed bytes, the sum is exact in 32 bits, the rest is float32. `correction` takes the activation's zero point
out of the sum: sum((x - z) * w) = sum(x * w) - z * sum(w). A picture is padded with x_zero_point, so the border is exact.

scale, correction (int32), bias: one for each output channel. row_scale, y_factor: one for each of the leading dimensions
that they have, such as (N, 1, 1, 1) for scales by timestep or (N, L, 1) by token. residual: any shape that broadcasts to y's.
activation: "none", "silu", "gelu" or "gelu_tanh". dtype: of y; torch.int8 writes bytes. tile: BLOCK_M, BLOCK_N, BLOCK_K, warps
and stages of the Triton kernel; or 0 and the number of one of cuDNN's plans (see `cudnn_int8`); empty: Triton's, by the shape.

weight: (C_out, KH, KW, C) int8, or (C_out, C) of a linear, C padded to a multiple of 16; see `stored`. With `weight_zero` (int8)
it holds two integers in a byte, of which the kernel subtracts it, so that weights of four bits stay packed; see `stored_packed`.

On a GPU they run `triton_int8`, and torch.compile and AOTInductor see that kernel, or cuDNN. Elsewhere they compute the same in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tfmq_fx.base import cudnn_int8
from tfmq_fx.base.onednn import pack_int4

CHANNELS = 16  # bytes that one load of the kernel reads: rows of weights and pixels are multiples of it

# More products of bytes than this could exceed 32 bits.
LONGEST_SUM = 2**31 // (255 * 128)

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: those that were the fastest for one of SD-XL's products on an H100.
TILES = (
    (128, 128, 128, 8, 3),
    (128, 256, 128, 8, 3),
    (128, 64, 128, 4, 4),
    (64, 128, 128, 4, 4),
    (64, 256, 64, 4, 4),
    (64, 64, 128, 4, 4),
)
CUDNN_PLANS = tuple((0, plan) for plan in range(cudnn_int8.PLANS))


def stored(signed: Tensor) -> Tensor:
    """Return (C_out, C_in, ...) signed bytes as the kernels read them: channels last, padded with zeros."""
    last = signed.movedim(1, -1)
    return F.pad(last, (0, -last.shape[-1] % CHANNELS)).contiguous()


def stored_packed(q: Tensor) -> Tensor:
    """Return (C_out, C_in, ...) integers 0..15 as the kernels read them: two in a byte, one half of the channels with the other.

    The padding is 0 and not the zero point: it is multiplied by what x is padded with, 0.
    """
    last = q.movedim(1, -1)
    last = F.pad(last, (0, -last.shape[-1] % (2 * CHANNELS)))
    return pack_int4(last.flatten(0, -2)).reshape(*last.shape[:-1], -1)


def tile_for(rows: int, columns: int, channels: int, taps: int = 1) -> tuple[int, int, int, int, int]:
    """Return a tile for a product of this size that was not measured. channels: bytes of the weight in one of the taps."""
    if taps > 1 and rows > 64 and channels >= 128:
        return TILES[2]  # on an H100, for each of SD-XL's windows within 20% of the fastest
    block_k = next((k for k in (128, 64) if channels % k == 0), 32 if channels < 64 else 64)
    few = -(-rows // 128) * -(-columns // 128) < 128  # fewer tiles than a large GPU has multiprocessors
    block_m = 64 if few or rows <= 64 else 128
    block_n = 64 if columns <= 64 or (few and block_m == 128) else 128
    return block_m, block_n, block_k, 8 if block_m * block_n > 128 * 64 else 4, 3 if block_k == 128 else 4


def fitted(
    tile: tuple[int, int, int, int, int], *, memory: int, packed: bool
) -> tuple[int, int, int, int, int]:
    """Return the tile with as many stages as fit in the shared memory of a multiprocessor, in bytes: 99 KiB on small GPUs."""
    block_m, block_n, block_k, warps, stages = tile
    stage = (block_m * (2 if packed else 1) + block_n) * block_k
    return block_m, block_n, block_k, warps, max(1, min(stages, memory // stage))


def _shared_memory(device: torch.device) -> int:
    """Return the bytes that one block of a GPU can share; those of the smallest, where tensors only say that they are on one."""
    if not torch.cuda.is_available():
        return 99 * 1024
    found: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return found


@torch.library.triton_op("tfmq::int8_conv2d", mutates_args=())
def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_zero: Tensor | None,
    scale: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    y_factor: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    x_zero_point: int,
    activation: str,
    tile: Sequence[int],
    y_scale: float,
    y_zero_point: int,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve; see the module."""
    shape = _conv_shape(x, weight, stride, padding, dilation)
    x = x.permute(0, 2, 3, 1)
    if x_zero_point and any(padding):  # what the kernel pads is 0
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]), value=x_zero_point)
        padding = (0, 0)
    if residual is not None:
        residual = residual.expand(shape).permute(0, 2, 3, 1)
    factors = (row_scale, residual, y_factor)
    place = (stride, padding, dilation)
    y = x.new_empty((shape[0], *shape[2:], shape[1]), dtype=dtype)
    y = _product(
        x, weight, weight_zero, scale, correction, bias, *factors, y, *place, activation, tile, y_scale, y_zero_point
    )  # fmt: skip
    return y.permute(0, 3, 1, 2)


@torch.library.triton_op("tfmq::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_zero: Tensor | None,
    scale: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    y_factor: Tensor | None,
    activation: str,
    tile: Sequence[int],
    y_scale: float,
    y_zero_point: int,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply; see the module."""
    shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None:
        residual = _pictures(residual.expand(shape))
    factors = (row_scale, residual, y_factor)
    place = ((1, 1), (0, 0), (1, 1))
    x = _pictures(x)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    y = _product(
        x, weight.unsqueeze(1).unsqueeze(1), weight_zero, scale, correction, bias, *factors, y, *place, activation, tile, y_scale,
        y_zero_point,
    )  # fmt: skip
    return y.reshape(shape)


@int8_conv2d.register_fake
def _fake_conv2d(x, weight, *rest):  # type: ignore[no-untyped-def]
    stride, padding, dilation = rest[7:10]
    n, c, h, w = _conv_shape(x, weight, stride, padding, dilation)
    return x.new_empty((n, h, w, c), dtype=rest[-1]).permute(0, 3, 1, 2)


@int8_linear.register_fake
def _fake_linear(x, weight, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[-1])


def _conv_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """Return (N, C_out, OH, OW)."""
    height, width = (
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, s, p, d in zip(x.shape[2:], weight.shape[1:3], stride, padding, dilation, strict=True)
    )
    return x.shape[0], weight.shape[0], height, width


def _pictures(x: Tensor) -> Tensor:
    """Return (..., C) as (N, H, W, C)."""
    return x.flatten(0, -4) if x.dim() >= 4 else x.reshape(x.shape[0], *[1] * (4 - x.dim()), *x.shape[1:])


def _product(
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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    tile: Sequence[int],
    y_scale: float,
    y_zero_point: int,
) -> Tensor:
    """Return y (N, OH, OW, C_out), computed from x (N, H, W, C_in) on x's device; the names are the operators'."""
    channels = weight.shape[-1] * (1 if weight_zero is None else 2)
    x = F.pad(x, (0, channels - x.shape[-1])) if channels > x.shape[-1] else x
    row_scale, y_factor = (None if f is None else f.reshape(-1) for f in (row_scale, y_factor))
    parts = (weight_zero, scale, correction, bias, row_scale, residual, y_factor)
    if not x.is_cuda:
        return _reference(
            x, weight, *parts, y.dtype, stride, padding, dilation, activation, y_scale, y_zero_point
        )
    if tuple(tile) in CUDNN_PLANS:
        place = (stride, padding, dilation)
        made: Tensor = cudnn_int8.product(
            x.contiguous(), weight, *parts[1:], y.shape, y.dtype, *place, activation, tile[1], y_scale, y_zero_point
        )  # fmt: skip
        return made
    from tfmq_fx.base.triton_int8 import launch  # Triton is there only where a GPU may be

    if not tile:
        _, *taps, channels = weight.shape
        by_shape = tile_for(y.shape[:-1].numel(), y.shape[-1], channels, taps[0] * taps[1])
        tile = fitted(by_shape, memory=_shared_memory(x.device), packed=weight_zero is not None)
    launch(
        x.contiguous(), weight, *parts, y,
        stride=stride, padding=padding, dilation=dilation, activation=activation, tile=tile,
        y_scale=y_scale, y_zero_point=y_zero_point,
    )  # fmt: skip
    return y


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
}


def _reference(
    x: Tensor,
    weight: Tensor,
    weight_zero: Tensor | None,
    scale: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    y_factor: Tensor | None,
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    y_scale: float,
    y_zero_point: int,
) -> Tensor:
    """Compute as the kernel does. Sums of bytes are exact in float64."""
    w = weight.double()
    if weight_zero is not None:
        w = torch.cat([weight & 15, weight >> 4], dim=-1).double() - weight_zero[:, None, None, None]
    total: Tensor = F.conv2d(
        x.permute(0, 3, 1, 2).double(),
        w.permute(0, 3, 1, 2),
        None,
        list(stride),
        list(padding),
        list(dilation),
    ).permute(0, 2, 3, 1)
    v = (total if correction is None else total - correction).float() * scale

    def by_row(factor: Tensor) -> Tensor:
        rows = v.shape[:-1].numel()
        return factor.float()[:, None].expand(-1, rows // factor.numel()).reshape(*v.shape[:-1], 1)

    v = v if row_scale is None else v * by_row(row_scale)
    v = v if bias is None else v + bias.float()
    v = v if residual is None else v + residual.float()
    v = _ACTIVATIONS[activation](v)
    v = v if y_factor is None else v * by_row(y_factor)
    if dtype != torch.int8:
        return v.to(dtype)
    return ((v * (1.0 / y_scale)).round() + y_zero_point).clamp(-128, 127).to(dtype).contiguous()
