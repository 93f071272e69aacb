"""Arithmetic of integers and 8-bit floats: scales and zero points from ranges, quantize and dequantize, rounding, bit packing.

Legend: R rows that each own one (scale, zero_point): the output channels of a weight or the groups in them, the
timesteps of an activation in the temporal block, the tokens of an activation. All functions are pure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfmq_fx.base import float8
from tfmq_fx.base._torchao import MappingType, choose_qparams_affine_with_min_max
from tfmq_fx.base.errors import TFMQError

SUPPORTED_BITS = (2, 3, 4, 5, 6, 7, 8)


FLOAT_BITS = 16  # 16 bits means: left in the network's own floating-point type
NETWORK_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what is left in float; scales are float32


# The number of values that `search_range` processes at once. With a few temporaries each, they fit in a
# core's cache.
CANDIDATES = 2**19
# The number of integers that are packed or unpacked at once: each takes tens of bytes meanwhile. A multiple of 8.
PACKED = 2**20


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name as files have it: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class NumberRange(ABC):
    """The numbers that a value is rounded to: quant_min <= q <= quant_max, stored as `dtype`, around a zero point.

    symmetric: the zero point is the middle of the range.
    """

    quant_min: int
    quant_max: int
    symmetric: bool
    dtype: torch.dtype

    @property
    @abstractmethod
    def bits(self) -> int: ...

    @abstractmethod
    def round_(self, x: Tensor) -> Tensor:
        """Round float32 or float64 to the nearest number, in place. Values outside the range may stay outside."""

    @abstractmethod
    def spacing(self, x: Tensor) -> Tensor | float:
        """Return the distance between the two numbers next to each value."""

    def nearest(self, x: Tensor) -> Tensor:
        """Return x rounded as by `round_`."""
        return self.round_(x.clone())


@dataclass(frozen=True, kw_only=True)
class IntegerRange(NumberRange):
    """The range of integers that a value may take: quant_min <= q <= quant_max, stored as `dtype`.

    Weights of at most 7 bits are affine, with a zero point per channel. Their q - zero_point still fits in a
    signed byte, so an int8 kernel with zero point 0 computes them exactly. 8-bit weights are symmetric for
    the same reason.

    Activations are affine and unsigned, as the x86 kernels expect. With a scale per token they are symmetric
    and signed, without the lowest integer, as the dynamic int8 kernels expect (torchao's, oneDNN's). The
    operands of a product of two activations are symmetric about 2**(bits - 1): int8 kernels take these
    without zero points.
    """

    @staticmethod
    def weight(bits: int) -> IntegerRange:
        if bits == 8:
            return IntegerRange(quant_min=-128, quant_max=127, symmetric=True, dtype=torch.int8)
        return IntegerRange(quant_min=0, quant_max=2**bits - 1, symmetric=False, dtype=torch.uint8)

    @staticmethod
    def activation(bits: int) -> IntegerRange:
        return IntegerRange(quant_min=0, quant_max=2**bits - 1, symmetric=False, dtype=torch.uint8)

    @staticmethod
    def operand(bits: int) -> IntegerRange:
        return IntegerRange(quant_min=0, quant_max=2**bits - 1, symmetric=True, dtype=torch.uint8)

    @staticmethod
    def token(bits: int) -> IntegerRange:
        high = 2 ** (bits - 1) - 1
        return IntegerRange(quant_min=-high, quant_max=high, symmetric=True, dtype=torch.int8)

    @property
    def bits(self) -> int:
        return (self.quant_max - self.quant_min).bit_length()

    def round_(self, x: Tensor) -> Tensor:
        return x.round_()

    def spacing(self, x: Tensor) -> float:  # noqa: ARG002
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Float8Range(NumberRange):
    """The numbers of float8_e4m3fn, from -448 to 448, with zero point 0: for weights and activations alike."""

    quant_min: int = -int(float8.LARGEST)
    quant_max: int = int(float8.LARGEST)
    symmetric: bool = True
    dtype: torch.dtype = float8.DTYPE

    @property
    def bits(self) -> int:
        return 8

    def round_(self, x: Tensor) -> Tensor:
        spacing = float8.spacing(
            x
        )  # a cast would round float64 twice, and what is beyond the range differs by version
        return x.div_(spacing).round_().mul_(spacing)

    def spacing(self, x: Tensor) -> Tensor:
        return float8.spacing(x)


INT, FLOAT8 = "int", "float8_e4m3fn"  # what a linear may multiply


def numbers_of(dtype: torch.dtype | None, integers: IntegerRange) -> NumberRange:
    """Return what is stored as `dtype`: the numbers of float8_e4m3fn, or else these integers."""
    return Float8Range() if dtype == float8.DTYPE else integers


def weight_numbers(bits: int, dtype: str) -> NumberRange:
    """Return what the weights of a layer with numbers of `dtype` are rounded to.

    Integers of at most 4 bits are exact in float8_e4m3fn, so a layer of that dtype may have them too.
    """
    floats = dtype == FLOAT8 and bits > float8.EXACT_BITS
    return Float8Range() if floats else IntegerRange.weight(bits)


def activation_numbers(bits: int, dtype: str) -> NumberRange:
    """Return what the input of a layer with numbers of `dtype` is rounded to, with one scale per tensor or timestep."""
    return Float8Range() if dtype == FLOAT8 else IntegerRange.activation(bits)


def token_numbers(bits: int, dtype: str) -> NumberRange:
    """Return the same for an input with one scale per token."""
    return Float8Range() if dtype == FLOAT8 else IntegerRange.token(bits)


def centred(q: Tensor, zero_point: Tensor, axis: int) -> Tensor | None:
    """Return q - zero_point as signed bytes, or None if they do not fit.

    zero_point: one for each index of `axis`.
    """
    shape = [-1 if i == axis else 1 for i in range(q.dim())]
    found = q.to(torch.int16) - zero_point.to(torch.int16).reshape(shape)
    fits = found.amin() >= -128 and found.amax() <= 127
    return found.to(torch.int8) if fits else None


# Without VNNI, x86 kernels add pairs of byte products in 16 bits. These sums saturate: 2 * 255 * 64 is the
# largest that fits. So kernels for unsigned activations and signed weights are exact on every CPU as long as
# |q - zero_point| is at most this.
PAIRS_FIT = 64


NO_INT8 = "this CPU has no int8 instructions (VNNI, AMX)"


SATURATES = f"{NO_INT8}: its sums of bytes would saturate"


class ByteSums(Enum):
    """How a CPU sums products of unsigned by signed bytes."""

    EXACT = "exact"  # in 32 bits: VNNI, AMX, Arm's dot products
    PAIRS = "pairs"  # two by two in 16 bits, which saturate beyond `PAIRS_FIT`: AVX2
    NONE = "none"  # it has no instruction for that


def saturates(signed: Tensor | None) -> bool:
    """Return True if weights, as returned by `centred`, exceed `PAIRS_FIT` or are None."""
    return signed is None or bool(signed.to(torch.int16).abs().max() > PAIRS_FIT)


def check_bits(bits: int, argument: str) -> None:
    """Raise TFMQError, naming `argument`, unless `bits` is 2 to 8, or 16 for float."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (*SUPPORTED_BITS, FLOAT_BITS):
        raise TFMQError(f"{argument}: {bits!r} is not a supported bit width; use 2 to 8, or 16 for float.")


def check_group_size(group_size: int, argument: str) -> None:
    """Raise TFMQError, naming `argument`, unless `group_size` is an integer of at least 2."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise TFMQError(
            f"{argument}: {group_size!r} is not a valid group size; use an integer of at least 2, e.g. 32, 64 or 128, or None for one "
            "scale per output channel."
        )


def fitting_group_size(group_size: int, columns: int) -> int | None:
    """Return a group size that divides a row of `columns` weights: `group_size`, or a smaller one near it.

    The candidates are the divisors of `columns` from half of `group_size` up to `group_size`. When
    `group_size` is not among them, half of it comes first (kernels take 32, 64, 128, 256), then the largest.
    Returns None when the row is one group: it is no longer than `group_size`, or it has no such divisor.
    """
    if columns <= group_size:
        return None
    divisors = [d for d in range(max(2, -(-group_size // 2)), group_size + 1) if columns % d == 0]
    return max(divisors, key=lambda d: (group_size % d == 0, d), default=None)


def choose_qparams(min_R: Tensor, max_R: Tensor, numbers: NumberRange) -> tuple[Tensor, Tensor]:
    """Return scale (R,) float32 > 0 and zero_point (R,) int32, within `numbers`, for rows in [min, max].

    Zero is always representable: the range is extended to include it, so one-signed, constant and all-zero
    rows get finite scales and in-range zero points.
    """
    return choose_qparams_affine_with_min_max(  # type: ignore[no-any-return]
        min_R.float(),
        max_R.float(),
        MappingType.SYMMETRIC if numbers.symmetric else MappingType.ASYMMETRIC,
        (1,),
        numbers.dtype,
        numbers.quant_min,
        numbers.quant_max,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )


def choose_shared_qparams(min_R: Tensor, max_R: Tensor, numbers: NumberRange) -> tuple[Tensor, Tensor]:
    """Return qparams as `choose_qparams` does, but with one zero point shared by all rows.

    The scales cover each row. The zero point minimises the mean over rows of (scale / the row's own best
    scale) ** 2, to which the squared rounding error is proportional. A symmetric range has one zero point anyway.
    """
    if numbers.symmetric:
        return choose_qparams(min_R, max_R, numbers)
    low_R, high_R = min_R.float().clamp_max(0), max_R.float().clamp_min(0)
    steps = numbers.quant_max - numbers.quant_min
    below_Z1 = torch.arange(steps + 1, device=low_R.device)[:, None]

    def needed(bound_R: Tensor, count_Z1: Tensor) -> Tensor:
        return torch.where(bound_R > 0, bound_R / count_Z1, 0.0)

    scale_ZR = torch.maximum(needed(-low_R, below_Z1), needed(high_R, steps - below_Z1))
    worse_ZR = torch.where(high_R > low_R, scale_ZR * steps / (high_R - low_R), 1.0)
    best = int(worse_ZR.square().mean(1).argmin())
    scale_R = scale_ZR[best].clamp_min(torch.finfo(torch.float32).tiny)
    zero_point_R = torch.full_like(scale_R, numbers.quant_min + best, dtype=torch.int32)
    return scale_R, zero_point_R


def quantize_rows(
    x: Tensor, scale_R: Tensor, zero_point_R: Tensor, numbers: NumberRange, axis: int = 0
) -> Tensor:
    """Return q = clamp(round(x / scale) + zero_point), in x's shape, with qparams per index of `axis`."""
    if isinstance(numbers, Float8Range):
        return float8.quantize(x, _along(scale_R, axis, x.dim()))  # type: ignore[no-any-return]
    return torch.ops.quantized_decomposed.quantize_per_channel(  # type: ignore[no-any-return]
        x, scale_R, zero_point_R, axis, numbers.quant_min, numbers.quant_max, numbers.dtype
    )


def dequantize_rows(
    q: Tensor, scale_R: Tensor, zero_point_R: Tensor, numbers: NumberRange, axis: int = 0
) -> Tensor:
    """Return (q - zero_point) * scale in float32, by the converted graph's own operators: bitwise equal."""
    if isinstance(numbers, Float8Range):
        return float8.dequantize(q, _along(scale_R, axis, q.dim()))  # type: ignore[no-any-return]
    return torch.ops.quantized_decomposed.dequantize_per_channel(  # type: ignore[no-any-return]
        q, scale_R, zero_point_R, axis, numbers.quant_min, numbers.quant_max, numbers.dtype
    )


def _along(scale_R: Tensor, axis: int, rank: int) -> Tensor:
    return scale_R.reshape([-1 if i == axis else 1 for i in range(rank)])


def search_range(
    x_RK: Tensor,
    numbers: NumberRange,
    *,
    p: float = 2.4,
    steps: int = 80,
    smallest: float = 0.2,
    weight_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the range (min_R, max_R) of each row, shrunk to minimise the L_p error of rounding.

    `steps` candidates shrink the row's own range linearly, down to a share `smallest` of it. p = 2.4 and 80
    steps are the reference implementation's values. weight_K: how much each column's error counts; None: all alike.
    """
    shrink_S1 = torch.tensor([[1.0 - (1.0 - smallest) * i / steps] for i in range(steps)], device=x_RK.device)
    low_R, high_R = x_RK.amin(1), x_RK.amax(1)
    # Try all candidates at once, for as many rows as fit in the cache. The workspace is reused: malloc would
    # scatter it.
    rows = min(len(x_RK), max(1, CANDIDATES // (steps * x_RK.shape[1])))
    workspace = x_RK.new_empty(steps * rows * x_RK.shape[1])
    for x_CK, low_C, high_C in zip(x_RK.split(rows), low_R.split(rows), high_R.split(rows), strict=True):
        low_SC, high_SC = low_C * shrink_S1, high_C * shrink_S1
        qparams = choose_qparams(low_SC.flatten(), high_SC.flatten(), numbers)
        scale, zero_point = (v.view(steps, -1, 1) for v in qparams)
        y_SCK = workspace[: steps * x_CK.numel()].view(steps, *x_CK.shape)
        torch.div(x_CK, scale, out=y_SCK)
        numbers.round_(y_SCK).add_(zero_point)
        y_SCK.clamp_(numbers.quant_min, numbers.quant_max)
        y_SCK.sub_(zero_point).mul_(scale).sub_(x_CK).abs_()
        # |error| ** p via logarithms, which handle 0 too: torch's pow takes 2.7 times as long, most of the
        # search time.
        y_SCK.log2_().mul_(p).exp2_()
        error_SC = y_SCK.sum(2) if weight_K is None else y_SCK @ weight_K
        # Candidates that overflow are skipped. Ties go to the first candidate: the whole range, if all
        # overflow.
        best_1C = error_SC.nan_to_num(torch.inf, torch.inf).argmin(0, keepdim=True)
        low_C.copy_(low_SC.gather(0, best_1C)[0])
        high_C.copy_(high_SC.gather(0, best_1C)[0])
    return low_R, high_R


def _bytes_of(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return values of so many bits each in a little-endian stream."""
    each = 8 // bits
    if each * bits != 8:
        return np.packbits(
            np.unpackbits(values[:, None], axis=1, count=bits, bitorder="little").reshape(-1),
            bitorder="little",
        )
    columns = np.pad(values, (0, -len(values) % each)).reshape(-1, each)
    found = columns[:, 0].copy()
    for i in range(1, each):
        found |= columns[:, i] << (i * bits)
    return found


def _values_of(stream: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Invert `_bytes_of`. There may be more values at the end, of the last byte's other bits."""
    each = 8 // bits
    if each * bits != 8:
        flat = np.unpackbits(stream, bitorder="little")
        rows = flat[: len(flat) // bits * bits].reshape(-1, bits)
        return np.packbits(rows, axis=1, bitorder="little")[:, 0]
    found = np.empty((len(stream), each), dtype=np.uint8)
    for i in range(each):
        found[:, i] = stream >> (i * bits) & (2**bits - 1)
    return found.reshape(-1)


def pack_bits(q: Tensor, integers: IntegerRange) -> Tensor:
    """Pack integers into a little-endian bit stream of `bits` each: ceil(numel * bits / 8) bytes of uint8."""
    flat = q.reshape(-1)
    packed = np.empty(-(-flat.numel() * integers.bits // 8), dtype=np.uint8)
    for start in range(0, flat.numel(), PACKED):
        part = flat[start : start + PACKED].to(torch.uint8).cpu().numpy()
        stream = _bytes_of(part - np.uint8(integers.quant_min % 256), integers.bits)  # it wraps around
        first = start * integers.bits // 8
        packed[first : first + len(stream)] = stream
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, shape: tuple[int, ...], integers: IntegerRange) -> Tensor:
    """Invert `pack_bits`. Raises TFMQError when the stream's length does not match the shape."""
    numel = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.numel() != -(-numel * integers.bits // 8):
        raise TFMQError(
            f"packed weight: {packed.numel()} bytes of {packed.dtype} found, but shape {shape} at "
            f"{integers.bits} bits takes {-(-numel * integers.bits // 8)} bytes of uint8."
        )
    found = torch.empty(numel, dtype=integers.dtype)
    for start in range(0, numel, PACKED):
        count, first = min(PACKED, numel - start), start * integers.bits // 8
        stream = packed[first : first + -(-count * integers.bits // 8)].numpy()
        unsigned = torch.from_numpy(_values_of(stream, integers.bits)[:count])
        if found.itemsize == 1:  # it wraps around
            found[start : start + count] = (unsigned + integers.quant_min % 256).view(integers.dtype)
        else:  # zero points
            found[start : start + count] = unsigned.to(integers.dtype) + integers.quant_min
    return found.reshape(shape)


class _FakeQuantizeRows(torch.autograd.Function):
    """Fake quantization, exactly as in the converted graph; straight-through gradient inside the range."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        scale_R: Tensor,
        zero_point_R: Tensor,
        numbers: NumberRange,
    ) -> Tensor:
        shape = [-1] + [1] * (x.dim() - 1)
        q = numbers.round_(x * (1.0 / scale_R.view(shape))) + zero_point_R.view(shape)
        ctx.save_for_backward((q >= numbers.quant_min) & (q <= numbers.quant_max))
        return dequantize_rows(
            quantize_rows(x, scale_R, zero_point_R, numbers), scale_R, zero_point_R, numbers
        ).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


def fake_quantize_rows(x: Tensor, scale_R: Tensor, zero_point_R: Tensor, numbers: NumberRange) -> Tensor:
    """Return x rounded to the quantization grid, with qparams per index of dim 0; differentiable in x."""
    return _FakeQuantizeRows.apply(x, scale_R, zero_point_R, numbers)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize(x: Tensor, scale: float, zero_point: int, numbers: NumberRange) -> Tensor:
    """Return x rounded to the quantization grid, with one scale."""
    if isinstance(numbers, Float8Range):
        return float8.dequantize(float8.quantize(x, scale), scale)  # type: ignore[no-any-return]
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, numbers.quant_min, numbers.quant_max)


def quantize_tokens(x: Tensor, numbers: NumberRange, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return x, rounded per token: scale = max |x| / quant_max over the last dim, in float32, zero point 0.

    dtype: of x and of the result.

    The converted graph is a trace of this function, so it calls only torch's own operators, each with its
    overload. quantized_decomposed.choose_qparams_per_token could replace the first four, but it supports 8
    bits only, and its meta kernel declares dtypes (float64, int64) that it does not return.
    """
    aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
    limits = (numbers.quant_min, numbers.quant_max, numbers.dtype)
    largest = aten.amax.default(aten.abs.default(x), [-1], True)
    if dtype != torch.float32:
        largest = aten._to_copy.default(largest, dtype=torch.float32)
    # A token of zeros, usually padding, gets a finite scale too.
    scale = aten.clamp.default(aten.div.Tensor(largest, numbers.quant_max), torch.finfo(torch.float32).eps)
    if isinstance(numbers, Float8Range):
        return float8.dequantize(float8.quantize(x, scale), scale, dtype)  # type: ignore[no-any-return]
    zero_point = aten.zeros_like.default(scale, dtype=torch.int32)
    q = decomposed.quantize_per_token.default(x, scale, zero_point, *limits)
    return decomposed.dequantize_per_token.default(q, scale, zero_point, *limits, dtype)  # type: ignore[no-any-return]


class _FakeQuantizeTokens(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        _ctx: torch.autograd.function.FunctionCtx, x: Tensor, numbers: NumberRange
    ) -> Tensor:
        return quantize_tokens(x, numbers, x.dtype)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None


def fake_quantize_tokens(x: Tensor, numbers: NumberRange) -> Tensor:
    """Return `quantize_tokens(x)` with a straight-through gradient.

    The gradient is 1 everywhere, because no value lies outside its own token's range.
    """
    return _FakeQuantizeTokens.apply(x, numbers)  # type: ignore[no-any-return, no-untyped-call]
