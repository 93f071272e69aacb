"""Minimum and maximum per timestep: the papers' estimator for finite set calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.observers.temporal import TemporalObserver


class TemporalMinMaxObserver(TemporalObserver):
    """An observer of the running minimum and maximum of each timestep (TFMQ-DM, FSC)."""

    min_val: Tensor
    max_val: Tensor

    def __init__(self, *, num_keys: int, **kwargs: Any) -> None:
        super().__init__(num_keys=num_keys, **kwargs)
        self.register_buffer("min_val", torch.full((num_keys,), torch.inf))
        self.register_buffer("max_val", torch.full((num_keys,), -torch.inf))

    def observe(self, x_NF: Tensor, step_N: Tensor) -> None:
        self.min_val.scatter_reduce_(0, step_N, x_NF.amin(1), "amin")
        self.max_val.scatter_reduce_(0, step_N, x_NF.amax(1), "amax")

    def ranges(self) -> tuple[Tensor, Tensor]:
        return self.min_val, self.max_val

    def merge(self, other: TemporalObserver) -> None:
        super().merge(other)
        assert isinstance(other, TemporalMinMaxObserver)
        self.min_val = torch.minimum(self.min_val, other.min_val)
        self.max_val = torch.maximum(self.max_val, other.max_val)
