"""Estimators that need the values themselves: MSE and percentile.

An activation of the temporal block is a function of the timestep (and of other finite inputs), so the
distinct rows of a timestep are few; they are kept, and a row seen again is dropped. That makes observing
A, then B, equal to observing both together.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.arithmetic import search_range
from tfmq_fx.observers.temporal import TemporalObserver


class TemporalSampleObserver(TemporalObserver):
    """Keeps each timestep's distinct rows; subclasses turn the rows of one timestep into its range."""

    def __init__(self, *, num_keys: int, **kwargs: Any) -> None:
        super().__init__(num_keys=num_keys, **kwargs)
        self.rows: list[list[Tensor]] = [[] for _ in range(num_keys)]

    def observe(self, x_NF: Tensor, step_N: Tensor) -> None:
        for x_F, step in zip(x_NF, step_N.tolist(), strict=True):
            self._add(x_F, step)

    def _add(self, x_F: Tensor, step: int) -> None:
        if not any(torch.equal(x_F, row) for row in self.rows[step]):
            self.rows[step].append(x_F.clone())

    def merge(self, other: TemporalObserver) -> None:
        super().merge(other)
        assert isinstance(other, TemporalSampleObserver)
        for step, rows in enumerate(other.rows):
            for x_F in rows:
                self._add(x_F, step)

    def ranges(self) -> tuple[Tensor, Tensor]:
        min_T = torch.zeros(self.num_keys)
        max_T = torch.zeros(self.num_keys)
        by_count: dict[int, list[int]] = {}
        for step, rows in enumerate(self.rows):
            by_count.setdefault(len(rows), []).append(step)
        for count, steps in by_count.items():
            if count:
                x_RK = torch.stack([torch.cat(sorted(self.rows[s], key=lambda r: r.tolist())) for s in steps])
                low_R, high_R = self.range_of(x_RK)
                min_T[steps], max_T[steps] = low_R.cpu(), high_R.cpu()
        return min_T, max_T

    @abstractmethod
    def range_of(self, x_RK: Tensor) -> tuple[Tensor, Tensor]:
        """(min_R, max_R) for R timesteps with K values each."""


class TemporalMSEObserver(TemporalSampleObserver):
    """The shrunk range with the least squared rounding error (L_2), per timestep."""

    def range_of(self, x_RK: Tensor) -> tuple[Tensor, Tensor]:
        return search_range(x_RK, self.integers, p=2.0)


class TemporalPercentileObserver(TemporalSampleObserver):
    """The central `percentile` percent of the values of each timestep."""

    def __init__(self, *, num_keys: int, percentile: float = 99.9, **kwargs: Any) -> None:
        super().__init__(num_keys=num_keys, **kwargs)
        self.percentile = percentile

    def range_of(self, x_RK: Tensor) -> tuple[Tensor, Tensor]:
        tail = (1.0 - self.percentile / 100.0) / 2.0
        return torch.quantile(x_RK, tail, dim=1), torch.quantile(x_RK, 1.0 - tail, dim=1)
