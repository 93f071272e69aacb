"""Tell rounding from another result."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative: that of sums in another order, far below another function of the inputs.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE_ROUNDING = 1e-2  # in bfloat16 and float16


def within_rounding(a: Tensor, b: Tensor, *, share: float = 1.0) -> bool:
    """Return True if a is b but for the rounding of sums in another order, `share` times as much; both of one shape."""
    allowed = share * ROUNDING.get(b.dtype, COARSE_ROUNDING)
    return a.shape == b.shape and bool((a - b).norm() <= allowed * b.norm())
