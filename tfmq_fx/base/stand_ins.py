"""What a tensor that some calls leave out is there: a mask of ones, where no row is padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StandIn:
    """A tensor (N, M) of one value, for a call of N rows without it in which another tensor has rows (M, ...)."""

    value: int
    like: str  # the flat name of that other tensor
    dtype: str

    def of(self, like: Tensor, rows: int) -> Tensor:
        """Return the tensor for a call. like: that other tensor, which may have one row for all."""
        return torch.full(
            (rows, like.shape[1]), self.value, dtype=getattr(torch, self.dtype), device=like.device
        )

    def to_json(self) -> list[Any]:
        """Return what an artefact keeps."""
        return [self.value, self.like, self.dtype]
