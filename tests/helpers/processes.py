"""Start processes to kill, to race and to share work with, which have torch and the library imported already.

A server that only imports them is forked. Each process is as fresh as `python -c`, without seconds of
imports.
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
    """Run `work(talk, *args)` on one thread in a new process. Return the process and our end of `talk`."""
    here, there = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=_run, args=(work, there, args, dict(environment or {})), daemon=True)
    process.start()
    there.close()
    return process, here


def finish(process: ForkServerProcess, talk: Connection, *, seconds: float = 300) -> Any:
    """Wait for the process to end, assert that it succeeded, and return the last object that it sent."""
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
