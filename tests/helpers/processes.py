"""Processes to kill, to race and to share work with, that have torch and the library imported when they begin.

One server imports them, does nothing else, and forks: as fresh as `python -c`, without seconds of imports each.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["benchmarks.networks.small"])


def start(
    work: Callable[..., None], *args: Any, environment: Mapping[str, str] | None = None
) -> tuple[ForkServerProcess, Connection]:
    """Run `work(talk, *args)` on one thread; the process, and the end of `talk` to hear it from."""
    here, there = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=_run, args=(work, there, args, dict(environment or {})), daemon=True)
    process.start()
    there.close()
    return process, here


def finish(process: ForkServerProcess, talk: Connection, *, seconds: float = 300) -> Any:
    """Wait for its end, which must be a good one; the last that it said."""
    said = None
    try:
        while talk.poll(seconds):
            said = talk.recv()
    except EOFError:
        pass
    process.join(seconds)
    assert process.exitcode == 0, said
    talk.close()
    return said


def _run(
    work: Callable[..., None], talk: Connection, args: tuple[Any, ...], environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        work(talk, *args)
    except BaseException:
        talk.send(traceback.format_exc())
        raise
