"""oneDNN's int8 kernels as graph operators; weights are laid out once, or unpacked from int4 at each call.

    tfmq::lay_out_conv, tfmq::lay_out_linear    int8 weight -> the same in oneDNN's own layout, opaque to torch
    tfmq::int4_conv, tfmq::int4_linear          unpack, lay out, and oneDNN's kernel, all at each call

torch's own operators do the arithmetic: torch.ops.onednn.qconv_pointwise and qlinear_pointwise take bytes,
sum in int32, and apply scales and bias in float32. torch's operators for the layout have no fake-tensor
implementation, so torch.export cannot trace them; the operators here have one.

Weights of at most four bits are packed one half of a row with the other: row[: n] in the low four bits and
row[n :] in the high ones, n = ceil(columns / 2), so that unpacking writes two contiguous runs of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

onednn = torch.ops.onednn
FLOAT = (1.0, 0)  # output scale and zero point of a kernel whose output is not quantized
# torch's arguments for nothing fused behind the kernel.
NO_POST_OP: tuple[str, list[float], str] = ("none", [], "")

_library = torch.library.Library("tfmq", "FRAGMENT")
_library.define(
    "lay_out_conv(Tensor weight, Tensor scale, float x_scale, int x_zero_point, int[] stride, int[] padding, "
    "int[] dilation, int groups, int[] x_shape) -> Tensor"
)
_library.define("lay_out_linear(Tensor weight, int[] x_shape) -> Tensor")
_library.define(
    "int4_conv(Tensor x, float x_scale, int x_zero_point, Tensor packed, Tensor zero_point, int[] shape, Tensor scale, "
    "Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, float y_scale, int y_zero_point, "
    "ScalarType dtype) -> Tensor"
)
_library.define(
    "int4_linear(Tensor x, float x_scale, int x_zero_point, Tensor packed, Tensor zero_point, int[] shape, Tensor scale, "
    "Tensor? bias, float y_scale, int y_zero_point, ScalarType dtype) -> Tensor"
)


def pack_int4(q: Tensor) -> Tensor:
    """Pack (R, ...) integers 0..15 into (R, ceil(C / 2)) bytes, with C integers in a row."""
    rows = q.flatten(1).to(torch.uint8)
    half = -(-rows.shape[1] // 2)
    high = torch.nn.functional.pad(rows[:, half:], (0, 2 * half - rows.shape[1]))
    return rows[:, :half] | (high << 4)


def unpack_int4(packed: Tensor, zero_point: Tensor, shape: list[int]) -> Tensor:
    """Return the signed bytes q - zero_point in the given shape; zero_point (R,) is int8."""
    rows, half = packed.shape
    q = torch.empty(rows, 2 * half, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=q[:, :half])
    torch.bitwise_right_shift(packed, 4, out=q[:, half:])
    centred = q.view(torch.int8).sub_(zero_point[:, None])
    return centred[:, : torch.Size(shape[1:]).numel()].reshape(shape)


def _lay_out_conv(weight, scale, x_scale, x_zero_point, stride, padding, dilation, groups, x_shape):  # type: ignore[no-untyped-def]
    return onednn.qconv_prepack(
        weight, scale, x_scale, x_zero_point, stride, padding, dilation, groups, x_shape
    )


def _lay_out_linear(weight: Tensor, x_shape: list[int]) -> Tensor:
    laid_out: Tensor = onednn.qlinear_prepack(weight, x_shape)
    return laid_out


def _int4_conv(  # type: ignore[no-untyped-def]
    x, x_scale, x_zero_point, packed, zero_point, shape, scale, bias, stride, padding, dilation, groups,
    y_scale, y_zero_point, dtype,
):  # fmt: skip
    place = (stride, padding, dilation, groups)
    weight = unpack_int4(packed, zero_point, shape)
    weight = onednn.qconv_prepack(weight, scale, x_scale, x_zero_point, *place, list(x.shape))
    zeros = torch.zeros(shape[0], dtype=torch.int32)
    given = (x, x_scale, x_zero_point, weight, scale, zeros, bias, *place, y_scale, y_zero_point, dtype)
    return onednn.qconv_pointwise(*given, *NO_POST_OP)


def _int4_linear(  # type: ignore[no-untyped-def]
    x, x_scale, x_zero_point, packed, zero_point, shape, scale, bias, y_scale, y_zero_point, dtype
):
    weight = onednn.qlinear_prepack(unpack_int4(packed, zero_point, shape), [x[..., 0].numel(), x.shape[-1]])
    zeros = torch.zeros(shape[0], dtype=torch.int32)
    given = (x, x_scale, x_zero_point, weight, scale, zeros, bias, y_scale, y_zero_point, dtype)
    return onednn.qlinear_pointwise(*given, *NO_POST_OP)


def _fake_int4_conv(  # type: ignore[no-untyped-def]
    x, x_scale, x_zero_point, packed, zero_point, shape, scale, bias, stride, padding, dilation, groups,
    y_scale, y_zero_point, dtype,
):  # fmt: skip
    weight = packed.new_empty(shape, dtype=torch.int8)
    given = (x, x_scale, x_zero_point, weight, scale, zero_point, bias, stride, padding, dilation, groups)
    return onednn.qconv_pointwise(*given, y_scale, y_zero_point, dtype, *NO_POST_OP)


for _name, _function in {
    "lay_out_conv": _lay_out_conv,
    "lay_out_linear": _lay_out_linear,
    "int4_conv": _int4_conv,
    "int4_linear": _int4_linear,
}.items():
    _library.impl(_name, _function, "CPU")
torch.library.register_fake("tfmq::lay_out_conv", lambda weight, *_: torch.empty_like(weight), lib=_library)
torch.library.register_fake(
    "tfmq::lay_out_linear", lambda weight, _: weight.new_empty(weight.shape[::-1]), lib=_library
)
torch.library.register_fake("tfmq::int4_conv", _fake_int4_conv, lib=_library)
torch.library.register_fake(
    "tfmq::int4_linear",
    lambda x, *rest: x.new_empty((*x.shape[:-1], rest[4][0]), dtype=rest[-1]),
    lib=_library,
)
