"""Hold the values of a walk over a graph: in memory while they fit, beyond that in half precision in mapped files."""

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
    """A tensor that was written to a file."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype  # of the tensor
    stored: torch.dtype  # of the numbers in the file
    device: torch.device  # of the tensor


@dataclass(frozen=True)
class _Lent:
    """A value that is read anew on each access."""

    read: Callable[[], Any]


@dataclass(frozen=True)
class _Shared:
    """A value that several `Values` hold."""

    value: Any


# When large values are freed but small ones between them stay, glibc keeps the holes: gigabytes of memory. A walk
# returns them to the system each time it has read and computed this many bytes, which bounds their size; more of them while
# it does not spill, since pages that are returned must be mapped anew.
TRIM_AFTER, TRIM_AFTER_IN_MEMORY = 2**27, 2**30
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Budget:
    """The number of bytes that each of a walk's `Values` may hold in memory, and the files for the rest.

    A context manager, which removes the files. The limit holds for each `Values` separately, so that the choice of
    values that are spilled, and thereby rounded, does not depend on the order of threads.
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
        """Count `size` bytes as allocated, most of which will be freed soon. Trim the heap when it is time."""
        with self._lock:
            self._passed += size
            full = self._passed > (TRIM_AFTER if self.spilled else TRIM_AFTER_IN_MEMORY)
            if full:
                self._passed = 0
        if full and _trim is not None:
            _trim(0)

    def spill(self, x: Tensor) -> _Spilled:
        """Write `x` to a new file, in half precision if it is a float. Raises TFMQError if it cannot be written."""
        stored = x.dtype
        if x.is_floating_point() and x.element_size() > 2:
            # float16 has finer steps; bfloat16 is for values beyond its range.
            stored = torch.float16 if x.abs().max() < 6e4 else torch.bfloat16
        data = x.detach().cpu().to(stored).contiguous()
        try:
            with self._lock:
                if self._folder is None:
                    self._folder = tempfile.TemporaryDirectory(prefix="tfmq-")
                self._count += 1
                self.spilled += data.nbytes
                file = Path(self._folder.name) / f"{self._count}.bin"
            # Write instead of mapping the file, so that a full disk raises OSError instead of a bus error.
            file.write_bytes(raw_bytes(data))
        except OSError as error:
            raise TFMQError(
                f"reconstruction: the streams exceed max_memory and cannot be spilled to {tempfile.gettempdir()} "
                f"({error.strerror or error}); raise Reconstruction.max_memory, lower num_samples, or set TMPDIR to a larger disk."
            ) from error
        return _Spilled(file, x.shape, x.dtype, stored, x.device)


class Values(MutableMapping[Node, Any]):
    """A mapping node -> value, like the dict that torch.fx's Interpreter keeps.

    Only tensors that the walk computes count towards the budget. Parameters do not.
    """

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
            value = flat.reshape(value.shape).to(value.device, value.dtype)
        else:
            return value
        if isinstance(value, Tensor):
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

    def lend(self, node: Node, read: Callable[[], Any]) -> None:
        """Set a value that is read anew on each access and never held."""
        self._held[node] = _Lent(read)

    def share(self, node: Node, value: Any) -> None:
        """Set a value that several `Values` share. It counts towards none of their budgets."""
        self._held[node] = _Shared(value)

    def __delitem__(self, node: Node) -> None:
        value = self._held.pop(node)
        if isinstance(value, _Spilled):
            value.file.unlink(missing_ok=True)
        elif _counts(node, value):
            self.used -= value.nbytes

    def __contains__(self, node: object) -> bool:  # without reading the value
        return node in self._held

    def __iter__(self) -> Iterator[Node]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _counts(node: Node, value: Any) -> bool:
    """Return True for tensors that the walk computes. The graph's own tensors are in memory anyway."""
    return isinstance(value, Tensor) and value.numel() > 0 and node.op != "get_attr"
