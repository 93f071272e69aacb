"""Numbers in float8_e4m3fn: four bits of exponent, three of mantissa, up to 448, no infinity.

A value x with scale s is stored as the nearest such number to x / s, within its bounds. Its relative error is at most 1 / 16,
whatever its size, down to s / 64; below, the numbers are s / 512 apart. Integers up to 16 are exact.

`quantize` and `dequantize` call only torch's own operators, each with its overload: a converted graph is a trace of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

aten = torch.ops.aten
DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max  # 448
MANTISSA = 3  # bits
LEAST_EXPONENT = -6  # of a normal number
EXACT_BITS = 4  # integers of at most so many bits, minus a zero point among them, are within -16..16


def quantize(x: Any, scale: Any) -> Any:
    """Return x / scale in float8_e4m3fn, clipped to its bounds. NaN stays NaN.

    scale: a number, or float32 that broadcasts to x. The quotient is computed in float32, whatever the dtype of x.
    """
    # Of a number too, the reciprocal is rounded to float32: the same scale gives the same bits in either form.
    is_number = isinstance(scale, float)
    inverse = float(np.float32(1) / np.float32(scale)) if is_number else aten.reciprocal.default(scale)
    y = aten.mul.Tensor(aten.to.dtype(x, torch.float32), inverse)
    return aten.to.dtype(aten.clamp.default(y, -LARGEST, LARGEST), DTYPE)


def dequantize(q: Any, scale: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return q * scale, computed in float32, in `dtype`. scale: as for `quantize`."""
    y = aten.mul.Tensor(aten.to.dtype(q, torch.float32), scale)
    return y if dtype == torch.float32 else aten.to.dtype(y, dtype)


def spacing(x: Tensor) -> Tensor:
    """Return the distance between the two neighbours of each value among these numbers, a power of two."""
    exponent = torch.frexp(x.abs().clamp_max(LARGEST)).exponent - 1  # frexp's mantissa is in [0.5, 1)
    exponent = torch.where(x == 0, LEAST_EXPONENT, exponent).clamp_min(LEAST_EXPONENT)
    return torch.ldexp(torch.ones_like(x), exponent - MANTISSA)
