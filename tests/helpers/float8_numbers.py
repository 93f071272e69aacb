"""All numbers of float8_e4m3fn, and values to round to them."""

import torch

from tfmq_fx.base import float8
from tfmq_fx.base.arithmetic import Float8Range

NUMBERS = Float8Range()
# All numbers, in order; the two zeros once.
ALL = torch.arange(256, dtype=torch.uint8).view(float8.DTYPE).double()
ALL = ALL[ALL.isfinite()].unique()


def values(dtype=torch.float32):
    """Values of all sizes, the numbers themselves and the ties between them."""
    found = torch.cat([ALL, (ALL[1:] + ALL[:-1]) / 2])
    given = torch.Generator().manual_seed(0)
    random = [torch.randn(5000, dtype=torch.float64, generator=given) * s for s in (150, 1, 0.01, 0.001)]
    return torch.cat([found, *random]).clamp(-448, 448).to(dtype)
