"""Values of a walk over a graph: in memory while they fit, past that in half precision in memory-mapped files."""

from __future__ import annotations

import ctypes
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import raw_bytes


@dataclass(frozen=True)
class _Spilled:
    file: Path
    shape: torch.Size
    dtype: torch.dtype  # as it was
    stored: torch.dtype  # as it lies in the file


@dataclass(frozen=True)
class _Lent:
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Shared:
    value: Any


# Where small values stay between large ones that go, glibc keeps the holes, gigabytes of them. They are given back each
# time that a walk which spills has read and computed so much: the holes are no larger.
TRIM_AFTER = 128 * 2**20
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Budget:
    """The bytes that each of a walk's `Values` may hold in memory; a context manager for what exceeds them.

    Each has its own, so that what is spilled, and thereby rounded, does not depend on which thread came first.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.spilled = 0
        self._count = 0
        self._passed = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()  # several threads compute parts at once

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def passed(self, size: int) -> None:
        """So many bytes came, and most of them will go."""
        with self._lock:
            self._passed += size
            full = self._passed > TRIM_AFTER
            if full:
                self._passed = 0
        if full and self.spilled and _trim is not None:
            _trim(0)

    def spill(self, x: Tensor) -> _Spilled:
        """Write `x` to a file of its own. Raises TFMQError when the disk does not take it."""
        stored = x.dtype
        if x.is_floating_point() and x.element_size() > 2:
            # float16 has the finer steps; bfloat16 takes what is too large for it.
            stored = torch.float16 if x.abs().max() < 6e4 else torch.bfloat16
        data = x.detach().cpu().to(stored).contiguous()
        try:
            with self._lock:
                if self._folder is None:
                    self._folder = tempfile.TemporaryDirectory(prefix="tfmq-")
                self._count += 1
                self.spilled += data.nbytes
                file = Path(self._folder.name) / f"{self._count}.bin"
            # Written, not mapped: a full disk is then an error and not a bus error.
            file.write_bytes(raw_bytes(data))
        except OSError as error:
            raise TFMQError(
                f"reconstruction: the streams exceed max_memory and cannot be spilled to {tempfile.gettempdir()} "
                f"({error.strerror or error}); raise Reconstruction.max_memory, lower num_samples, or set TMPDIR to a larger disk."
            ) from error
        return _Spilled(file, x.shape, x.dtype, stored)


class Values(MutableMapping[Node, Any]):
    """Node -> value, like the dict that torch.fx's Interpreter keeps; parameters and small things are left alone."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.used = budget, 0
        self._held: dict[Node, Any] = {}

    def __getitem__(self, node: Node) -> Any:
        value = self._held[node]
        if isinstance(value, _Shared):
            return value.value
        if isinstance(value, _Lent):
            value = value.read()
        elif isinstance(value, _Spilled):
            flat = torch.from_file(str(value.file), size=value.shape.numel(), dtype=value.stored)
            value = flat.reshape(value.shape).to(value.dtype)
        else:
            return value
        self.budget.passed(value.nbytes)
        return value

    def __setitem__(self, node: Node, value: Any) -> None:
        self.pop(node, None)
        if _counts(node, value):
            self.budget.passed(value.nbytes)
            if self.used + value.nbytes > self.budget.limit:
                value = self.budget.spill(value)
            else:
                self.used += value.nbytes
        self._held[node] = value

    def lend(self, node: Node, read: Callable[[], Tensor]) -> None:
        """A value that is read anew each time, and not held."""
        self._held[node] = _Lent(read)

    def share(self, node: Node, value: Any) -> None:
        """A value that several hold, and that counts for none of them."""
        self._held[node] = _Shared(value)

    def __delitem__(self, node: Node) -> None:
        value = self._held.pop(node)
        if isinstance(value, _Spilled):
            value.file.unlink(missing_ok=True)
        elif _counts(node, value):
            self.used -= value.nbytes

    def __iter__(self) -> Iterator[Node]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _counts(node: Node, value: Any) -> bool:
    """Tensors that the walk computes; the graph's own are in memory anyway."""
    return isinstance(value, Tensor) and value.numel() > 0 and node.op != "get_attr"
