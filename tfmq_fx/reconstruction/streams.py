"""Run a block on its inputs in the float network, and on its inputs in the quantized network."""

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
    """A part of the rows of a chunk of calibration data."""

    index: int  # among all parts that this process holds
    share: float  # the fraction of the chunk's rows
    first: int  # the position of its first row among the rows of all chunks
    count: int  # the number of its rows


class Streams:
    """A block, and a function that runs any module with the block's inputs on a part of the data.

    chunks: the mini-batches, each as the parts of it that this process holds. The parts of all processes together
        are the whole chunk.
    run(module, part, quantized) -> the module's outputs, on its inputs in the quantized or the float network. Several
        threads call it at once.
    target(part): returns the block's float outputs if they are kept elsewhere; None computes them.
    keep(part, outputs): takes the quantized block's outputs whenever `error` computes them.

    kept: whether the outputs that `keep` took are those of the block as it is now.
    """

    kept: bool = False

    # Float outputs are kept for at most this many parts. With more (a product of keys) they might not fit in memory, and
    # are computed each time.
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
        keep: Callable[[Part, Outputs], None] | None = None,
    ) -> None:
        self.block, self.run, self.chunks, self._given, self._keep = block, run, chunks, target, keep
        self.workers, self.ranks = workers, ranks
        self.parts = [part for chunk in chunks for part in chunk]
        self._float = without_observers(block)
        self._targets: dict[Part, Outputs] = {}

    def outputs(self, part: Part) -> Outputs:
        """Return the quantized block's outputs on its inputs in the quantized network."""
        return self.run(self.block, part, True)

    def firsts(self, module: GraphModule, parts: Sequence[Part], *, quantized: bool) -> list[Tensor]:
        """Return the first output of another module with the block's inputs, for each part."""
        return self.workers.map(lambda part: self.run(module, part, quantized)[0], parts)

    @torch.no_grad()
    def target(self, part: Part) -> Outputs:
        """Return the float block's outputs on its inputs in the float network."""
        if self._given is not None:
            return self._given(part)
        if part in self._targets:
            return self._targets[part]
        found = self.run(self._float, part, False)
        if len(self.parts) <= self.kept_targets:
            self._targets[part] = found
        return found

    def squared_error(self, part: Part) -> Tensor:
        """Return the squared error of a part, times the part's share.

        It is summed over dim 1 (channels or features), averaged over the other dims, and summed over the outputs.
        """
        pairs = zip(self.outputs(part), self.target(part), strict=True)
        errors = [difference(y, x).square().sum(1).mean() for y, x in pairs if x.is_floating_point()]
        return torch.stack(errors).sum() * part.share

    @torch.no_grad()
    def mean_squared_error(self) -> float:
        """Return the `squared_error` of a whole chunk, averaged over chunks."""
        (total,) = self.ranks.sum(
            [_sum([e.double() for e in self.workers.map(self.squared_error, self.parts)])]
        )
        return total.item() / len(self.chunks)

    def gradients(self, chunk: int, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the `squared_error` of a whole chunk, and its gradients.

        Parts are summed in order, and then processes.
        """

        def of_part(part: Part) -> list[Tensor]:
            with torch.enable_grad():
                loss = self.squared_error(part)
            return [
                loss.detach(),
                *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True),
            ]

        parts, sums = self.chunks[chunk], [torch.zeros(()), *[torch.zeros_like(x) for x in leaves]]
        for i in range(0, len(parts), self.workers.count):  # hold only one set of gradients per thread
            for found in self.workers.map(of_part, parts[i : i + self.workers.count]):
                sums = [total.to(x.device) + x for total, x in zip(sums, found, strict=True)]
        loss, *gradients = self.ranks.sum(sums)
        return loss, gradients

    @torch.no_grad()
    def error(self) -> float:
        """Return the mean squared error over all parts and outputs."""

        def of_part(part: Part) -> Tensor:
            total = torch.zeros(2, dtype=torch.float64)
            outputs = self.outputs(part)
            if self._keep is not None:
                self._keep(part, outputs)
            for y, x in zip(outputs, self.target(part), strict=True):
                if x.is_floating_point():
                    total += torch.stack(
                        [difference(y, x).square().sum().double().cpu(), torch.tensor(float(x.numel()))]
                    )
            return total

        found = self.workers.map(of_part, self.parts)
        self.kept = self._keep is not None
        (sums,) = self.ranks.sum([_sum(found) if found else torch.zeros(2, dtype=torch.float64)])
        return float(sums[0] / sums[1])


def difference(y: Tensor, x: Tensor) -> Tensor:
    """Return y - x in float32: the error of an output in half precision may be below its last bit."""
    return y.float() - x.float()


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum, added up in order; zero for no tensors."""
    total = torch.zeros((), dtype=torch.float64) if not tensors else tensors[0].clone()
    for x in tensors[1:]:
        total += x
    return total
