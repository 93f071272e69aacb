"""Measure a process's own memory: what the kernel can neither drop nor read again from a file."""

from __future__ import annotations

import threading
from pathlib import Path


class OwnMemory:
    """The peak of a process's own memory in GiB, while the context is open. Linux only.

    Resident size would include pages of mapped files, which the kernel can drop.

    anonymous: memory without a file. with_dirty: that, and the pages of mapped files that are changed and not written
        yet.
    """

    def __init__(self) -> None:
        self.anonymous = self.with_dirty = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> OwnMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        count = 0
        while not self._stop.wait(0.02):
            self.anonymous = max(self.anonymous, anonymous())
            if count % 50 == 0:  # it takes the kernel tens of milliseconds to walk large mappings
                self.with_dirty = max(self.with_dirty, anonymous_and_dirty())
            count += 1
        self.with_dirty = max(self.with_dirty, self.anonymous)


def anonymous() -> float:
    """Return the GiB of this process's memory that have no file."""
    return _kilobytes("/proc/self/status", "RssAnon:") / 2**20


def anonymous_and_dirty() -> float:
    """Return the GiB of this process's memory that have no file, or differ from it."""
    file = "/proc/self/smaps_rollup"
    return sum(_kilobytes(file, name) for name in ("Private_Dirty:", "Shared_Dirty:")) / 2**20


def _kilobytes(file: str, name: str) -> int:
    return int(Path(file).read_text().partition(name)[2].split()[0])
