"""Compute a mini-batch in parts: by threads of this process, and by processes of a torch.distributed group.

A mini-batch is cut into parts (`Reconstruction.shards`). Each part is computed on one thread, and the parts
are summed in order. So the result depends on the parts, not on the thread or process that computed them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tfmq_fx.base.errors import TFMQError

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Threads that each run torch single-threaded, so that no operator's sum depends on their number."""

    def __init__(self, pool: ThreadPoolExecutor | None, count: int = 1) -> None:
        self._pool, self.count = pool, count

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return the function's results in the order of the items, computed in the caller's grad mode."""
        if self._pool is None:
            return [function(item) for item in items]
        grad = torch.is_grad_enabled()

        def call(item: T) -> R:
            with torch.set_grad_enabled(grad):  # each thread has its own grad mode
                return function(item)

        return list(self._pool.map(call, items))


@contextmanager
def workers(parts: int) -> Iterator[Workers]:
    """Yield one worker per torch thread, at most `parts`; until exit, torch itself runs on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if min(threads, parts) <= 1:
            yield Workers(None)
        else:
            count = min(threads, parts)
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield Workers(pool, count)
    finally:
        torch.set_num_threads(threads)


class Ranks:
    """The processes that share the work: those of the default process group, or this process alone.

    All of them must call each method together. A method raises TFMQError when another process is gone.
    """

    def __init__(self) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    def share(self, items: Sequence[T]) -> list[T]:
        """Return the items that this process works on."""
        return list(items[self.rank :: self.size])

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over all processes, with the same bits in each."""
        if self.size == 1:
            return list(tensors)
        summed: list[Tensor | None] = [None] * len(tensors)
        for dtype in sorted({x.dtype for x in tensors}, key=str):
            group = [i for i, x in enumerate(tensors) if x.dtype == dtype]
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in group]).to(self._device())
            with _reported():
                dist.all_reduce(flat)
            parts = flat.split([tensors[i].numel() for i in group])
            for i, part in zip(group, parts, strict=True):
                summed[i] = part.reshape(tensors[i].shape).to(tensors[i].device)
        return [x for x in summed if x is not None]

    def all(self, flag: bool) -> bool:
        """Return True if `flag` is true in every process."""
        if self.size == 1:
            return flag
        (count,) = self.sum([torch.tensor(float(flag))])
        return int(count) == self.size

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _reported():
            dist.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """Return rank 0's value."""
        if self.size == 1:
            return value
        values = [value]
        with _reported():
            dist.broadcast_object_list(values, src=0, device=self._device())
        return values[0]

    @staticmethod
    def _device() -> torch.device:
        """Return the device of the group's messages: the CPU, unless the group only supports NCCL."""
        return torch.device("cpu" if "cpu" in str(dist.get_backend_config()) else "cuda")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the group of the processes that `torchrun` started, until exit.

    Without torchrun, yield this process alone. Raises TFMQError when the group cannot be created.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks()
        return
    try:
        dist.init_process_group()  # gloo for tensors in CPU memory, NCCL for those on a GPU
    except (RuntimeError, ValueError) as error:
        raise TFMQError(
            f"torch.distributed: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the process group could not be created ({error}); start with torchrun."
        ) from error
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TFMQError(
            f"rank {dist.get_rank()} of {dist.get_world_size()}: another process of the group has exited or hangs "
            f"({str(error).splitlines()[0][:160]}); start all of them again, with the same state folder to keep what is finished."
        ) from error
