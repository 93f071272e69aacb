"""Share settings, seed, finished blocks, threads and processes among the blocks of one reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from tfmq_fx.base.errors import TFMQError, first_line
from tfmq_fx.base.parallel import Ranks, Workers
from tfmq_fx.graph.inputs import fixed_batch, rows_at_once
from tfmq_fx.passes.quantize.results import BlockResult
from tfmq_fx.recipe import Reconstruction
from tfmq_fx.reconstruction.resume import Finished
from tfmq_fx.reconstruction.rounding import choose_rounding
from tfmq_fx.reconstruction.streams import Part, Streams


@dataclass(frozen=True)
class Run:
    """The settings and resources that all blocks of one `reconstruct` call share."""

    settings: Reconstruction
    seed: int
    finished: Finished
    workers: Workers
    ranks: Ranks

    def parts(self, gm: GraphModule, shared: Collection[str]) -> int:
        """Return how many parts a mini-batch is computed in: its shards, each in as many as `rows_at_once` makes of it.

        It is one part if the graph takes only one batch size. shared: names of the inputs that have no rows.
        """
        if fixed_batch(gm, shared):
            return 1
        shards = self.settings.shards
        rows = math.ceil(self.settings.batch_size / shards)
        return shards * math.ceil(rows / rows_at_once(gm, rows, shared))

    def split(self, chunks: Iterable[Tensor], parts: int) -> tuple[list[list[Part]], list[Tensor]]:
        """Split each chunk of row indices into `parts` parts.

        Returns the parts that belong to this process, by chunk, and the row indices of each of these parts.
        """
        found: list[list[Part]] = []
        rows: list[Tensor] = []
        first = 0
        for chunk in chunks:
            found.append([])
            for piece in self.ranks.share(torch.arange(len(chunk)).tensor_split(parts)):
                if size := len(piece):
                    found[-1].append(Part(len(rows), size / len(chunk), first + int(piece[0]), size))
                    rows.append(chunk[piece])
            first += len(chunk)
        return found, rows

    def choose(
        self, name: str, index: int, streams: Streams, *, method: str, iterations: int, watch: bool = False
    ) -> BlockResult:
        """Choose the integers of one block, or restore them from an earlier run.

        name, method, iterations, watch: as `choose_rounding` takes them.
        index: the block's number among the finished blocks.
        """

        def learn() -> BlockResult:
            return choose_rounding(
                name,
                streams,
                method=method,
                settings=self.settings,
                iterations=iterations,
                order=self.order(index, len(streams.chunks)),
                watch=watch,
            )

        return self.once(index, streams.block, learn)

    def once(self, index: int, block: GraphModule, learn: Callable[[], BlockResult]) -> BlockResult:
        """Restore the block from an earlier run; if there is none, call `learn` and save the block."""
        result = self.finished.restore(index, block)
        if result is None:
            result = learn()
            self.finished.keep(index, block, result)
        return result

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Convert running out of the device's memory to a TFMQError that names the block, and what is kept."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            kept = "nothing is kept, since no state folder was given"
            if self.finished.folder is not None:
                kept = f"the finished blocks are in {self.finished.folder}, where the same call goes on"
            raise TFMQError(
                f"reconstruction of block {name}: out of memory ({first_line(error)}); {kept}. Free some of the device's memory, or "
                "start anew with a lower Reconstruction.batch_size or gptq_memory, or with the network on the CPU and execution_device=."
            ) from error

    def order(self, index: int, chunks: int) -> Callable[[], int]:
        """Return a function that returns the next chunk to learn from: all of them, shuffled, then all again."""
        # With a generator for each block, its draws do not depend on the blocks before it.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        pending: list[int] = []

        def following() -> int:
            if not pending:
                pending.extend(torch.randperm(chunks, generator=generator).tolist())
            return pending.pop()

        return following
