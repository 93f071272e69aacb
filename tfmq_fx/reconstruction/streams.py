"""Run a block on what the float network would feed it, and on what the quantized one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from tfmq_fx.base.parallel import Ranks, Workers
from tfmq_fx.passes.quantize.observed import without_observers

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Part:
    """Some rows of a chunk of calibration data."""

    index: int  # among all parts that this process holds
    share: float  # of the chunk's rows
    first: int  # of its rows among those of all chunks
    count: int  # of its rows


class Streams:
    """A block, and how any module with its inputs runs on a part of the data in the float or the quantized network.

    chunks: the mini-batches, each as the parts of it that this process holds; together they are the whole chunk.
    run(module, part, quantized) -> the module's outputs; called by several threads at once.
    target(part): the block's float outputs where they are kept elsewhere; None computes them.
    """

    # Float outputs of at most so many parts are kept; those of more (a product of keys) are computed again each time:
    # they would not fit in memory.
    kept_targets: float = 64

    def __init__(
        self,
        block: GraphModule,
        run: Callable[[GraphModule, Part, bool], Outputs],
        chunks: Sequence[Sequence[Part]],
        *,
        workers: Workers,
        ranks: Ranks,
        target: Callable[[Part], Outputs] | None = None,
    ) -> None:
        self.block, self.run, self.chunks, self._given = block, run, chunks, target
        self.workers, self.ranks = workers, ranks
        self.parts = [part for chunk in chunks for part in chunk]
        self._float = without_observers(block)
        self._targets: dict[Part, Outputs] = {}

    def outputs(self, part: Part) -> Outputs:
        return self.run(self.block, part, True)

    def firsts(self, module: GraphModule, parts: Sequence[Part], *, quantized: bool) -> list[Tensor]:
        """The first output of another module with the block's inputs, for each part."""
        return self.workers.map(lambda part: self.run(module, part, quantized)[0], parts)

    @torch.no_grad()
    def target(self, part: Part) -> Outputs:
        if self._given is not None:
            return self._given(part)
        if part in self._targets:
            return self._targets[part]
        found = self.run(self._float, part, False)
        if len(self.parts) <= self.kept_targets:
            self._targets[part] = found
        return found

    def squared_error(self, part: Part) -> Tensor:
        """Sum over dim 1 (channels or features), mean over the rest, summed over the outputs; times the part's share."""
        pairs = zip(self.outputs(part), self.target(part), strict=True)
        errors = [(y - x).square().sum(1).mean() for y, x in pairs if x.is_floating_point()]
        return torch.stack(errors).sum() * part.share

    @torch.no_grad()
    def mean_squared_error(self) -> float:
        """`squared_error` of a whole chunk, on average."""
        (total,) = self.ranks.sum(
            [_sum([e.double() for e in self.workers.map(self.squared_error, self.parts)])]
        )
        return total.item() / len(self.chunks)

    def gradients(self, chunk: int, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`squared_error` of a whole chunk and its gradients: sums over parts in their order, then over processes."""

        def of_part(part: Part) -> list[Tensor]:
            with torch.enable_grad():
                loss = self.squared_error(part)
            return [
                loss.detach(),
                *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True),
            ]

        parts, sums = self.chunks[chunk], [torch.zeros(()), *[torch.zeros_like(x) for x in leaves]]
        for i in range(0, len(parts), self.workers.count):  # no more gradients at once than threads compute
            for found in self.workers.map(of_part, parts[i : i + self.workers.count]):
                sums = [total.to(x.device) + x for total, x in zip(sums, found, strict=True)]
        loss, *gradients = self.ranks.sum(sums)
        return loss, gradients

    @torch.no_grad()
    def error(self) -> float:
        """Mean squared error over all parts and outputs."""

        def of_part(part: Part) -> Tensor:
            total = torch.zeros(2, dtype=torch.float64)
            for y, x in zip(self.outputs(part), self.target(part), strict=True):
                if x.is_floating_point():
                    total += torch.stack(
                        [(y - x).square().sum().double().cpu(), torch.tensor(float(x.numel()))]
                    )
            return total

        found = self.workers.map(of_part, self.parts)
        (sums,) = self.ranks.sum([_sum(found) if found else torch.zeros(2, dtype=torch.float64)])
        return float(sums[0] / sums[1])


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """In their order."""
    total = torch.zeros((), dtype=torch.float64) if not tensors else tensors[0].clone()
    for x in tensors[1:]:
        total += x
    return total
