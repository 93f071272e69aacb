"""Show progress with an ETA on anything that takes over two seconds; silent in pipes and tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


QUIET_SECONDS = 2.0


def track(items: Collection[T], description: str) -> Iterator[T]:
    """Iterate over `items`, showing a bar with the time left once two seconds have passed."""
    console = Console(stderr=True)
    if not console.is_terminal or not sys.stderr.isatty():
        yield from items
        return
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(description, total=len(items))
    shown = False
    try:
        for item in items:
            yield item
            progress.advance(task)
            if not shown and time.monotonic() - started > QUIET_SECONDS:
                progress.start()
                shown = True
    finally:
        if shown:
            progress.stop()


class Clock:
    """A stopwatch of seconds by stage: wall time, and CPU time of all threads together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._last = time.monotonic(), time.process_time()

    def lap(self, stage: str) -> None:
        """Record the time since the previous lap, or since the start, as that of `stage`."""
        now = time.monotonic(), time.process_time()
        self.seconds[stage], self.cpu_seconds[stage] = (
            round(b - a, 3) for a, b in zip(self._last, now, strict=True)
        )
        self._last = now
