"""Estimators that need the values themselves: MSE, KL and percentile.

An activation of the temporal block is a function of the timestep (and of other finite inputs), so a timestep
has few distinct rows. The observers keep these and drop rows that they have seen before. So observing A, then
B, equals observing both together.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.base.arithmetic import search_range
from tfmq_fx.observers.temporal import TemporalObserver


class TemporalSampleObserver(TemporalObserver):
    """An observer that keeps each timestep's distinct rows; subclasses turn these into its range."""

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
        min_T, max_T = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        by_count: dict[int, list[int]] = {}
        for step, rows in enumerate(self.rows):
            by_count.setdefault(len(rows), []).append(step)
        for count, steps in by_count.items():
            if count:
                x_RK = torch.stack([torch.cat(sorted(self.rows[s], key=lambda r: r.tolist())) for s in steps])
                low_R, high_R = self.range_of(x_RK)
                at = torch.tensor(steps)
                min_T[at], max_T[at] = low_R, high_R
        return min_T, max_T

    @abstractmethod
    def range_of(self, x_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Return (min_R, max_R) for R timesteps with K values each."""


class TemporalMSEObserver(TemporalSampleObserver):
    """An observer that shrinks each timestep's range to the least squared rounding error (L_2)."""

    def range_of(self, x_RK: Tensor) -> tuple[Tensor, Tensor]:
        return search_range(x_RK, self.numbers, p=2.0)


class TemporalPercentileObserver(TemporalSampleObserver):
    """An observer whose range covers the central `percentile` percent of each timestep's values."""

    def __init__(self, *, num_keys: int, percentile: float = 99.9, **kwargs: Any) -> None:
        super().__init__(num_keys=num_keys, **kwargs)
        self.percentile = percentile

    def range_of(self, x_RK: Tensor) -> tuple[Tensor, Tensor]:
        tail = (1.0 - self.percentile / 100.0) / 2.0
        return torch.quantile(x_RK, tail, dim=1), torch.quantile(x_RK, 1.0 - tail, dim=1)


class TemporalKLObserver(TemporalSampleObserver):
    """An observer that shrinks each timestep's range to the least Kullback-Leibler divergence.

    The divergence is from the values to the rounded ones: entropy calibration (Migacz, "8-bit Inference with
    TensorRT", GTC 2017) for affine ranges, on a histogram of a timestep's values. P is the histogram inside
    the range, with the values outside counted in the outermost bins. Q spreads the sum over the bins of an
    integer evenly over those that are not empty. With fewer values than bins the whole range wins.
    """

    CANDIDATES = 80  # as many as `search_range` tries
    BINS = 8  # for each integer

    def range_of(self, x_RK: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.numbers.quant_max - self.numbers.quant_min + 1
        bins = levels * self.BINS
        low_R1, high_R1 = x_RK.amin(1, keepdim=True), x_RK.amax(1, keepdim=True)
        width_R1 = (high_R1 - low_R1).clamp_min(1e-12)
        bin_RK = ((x_RK - low_R1) / width_R1 * bins).long().clamp_max(bins - 1)
        counts_RB = x_RK.new_zeros(len(x_RK), bins).scatter_add(1, bin_RK, torch.ones_like(x_RK))
        number_B = torch.arange(bins, device=x_RK.device)
        centre_RB = low_R1 + (number_B + 0.5) / bins * width_R1
        best_R1, shrink_R1 = torch.full_like(low_R1, torch.inf), torch.ones_like(low_R1)
        for shrink in torch.linspace(1.0, 0.2, self.CANDIDATES).tolist():
            level_RB = ((centre_RB - shrink * low_R1) / (shrink * width_R1) * levels).floor()
            inside_RB = (level_RB >= 0) & (level_RB < levels)
            level_RB = level_RB.clamp(0, levels - 1).long()
            # The bins inside are contiguous; values outside count in the first or the last of them. Where all
            # values are equal, there may be none inside.
            first_R1 = inside_RB.int().argmax(1, keepdim=True)
            last_R1 = first_R1 + (inside_RB.sum(1, keepdim=True) - 1).clamp_min(0)
            nearest_RB = number_B.clamp(first_R1, last_R1)
            p_RB = torch.zeros_like(counts_RB).scatter_add(1, nearest_RB, counts_RB)
            kept_RB = counts_RB * inside_RB
            sums_RL, filled_RL = (
                x_RK.new_zeros(len(x_RK), levels).scatter_add(1, level_RB, n)
                for n in (kept_RB, (kept_RB > 0).float())
            )
            q_RB = (kept_RB > 0) * (sums_RL / filled_RL.clamp_min(1)).gather(1, level_RB)
            p_RB, q_RB = (n / n.sum(1, keepdim=True) for n in (p_RB, q_RB))
            # A bin that P has and Q lacks holds clipped values only.
            terms_RB = torch.where(p_RB > 0, p_RB * (p_RB / q_RB.clamp_min(1e-9)).log(), 0.0)
            divergence_R1 = terms_RB.sum(1, keepdim=True).nan_to_num(torch.inf)
            better_R1 = divergence_R1 < best_R1
            best_R1 = torch.where(better_R1, divergence_R1, best_R1)
            shrink_R1 = torch.where(better_R1, shrink, shrink_R1)
        return (shrink_R1 * low_R1)[:, 0], (shrink_R1 * high_R1)[:, 0]
