"""Keep torch settings of the caller's program out of what this library computes.

setting                                       holds for      `neutral` makes it
autocast, of each device type                 this thread    off
inference_mode                                this thread    off
default device                                this thread    the CPU
default dtype                                 the process    float32

The grad mode needs nothing here: each function sets its own. Nor do deterministic algorithms: with them, the
operators used here compute the same values. New threads start without the settings that hold for one thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "xla")  # the device types that torch.autocast takes


@contextmanager
def neutral() -> Iterator[None]:
    """Compute as in a program that has changed none of torch's settings, until exit; then restore them.

    For use as a context or as a decorator.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(no_autocast())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_float32.held())
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Turn autocast off on every device type on which it is on, until exit."""
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def tracked(x: Tensor) -> Tensor:
    """Return a tensor that autograd can use: x itself, or one on the same memory if x came from inference_mode."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        like = torch.empty(0, dtype=x.dtype, device=x.device)
        return like.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())  # type: ignore[call-overload, no-any-return]


def traced(tensors: Iterable[Tensor]) -> bool:
    """Return True if a compiler or export traces the call with these tensors, so that they have no values.

    torch.compiler.is_compiling() would be True in all threads while one of them compiles.
    """
    return torch.compiler.is_dynamo_compiling() or any(isinstance(x, FakeTensor) for x in tensors)


def has_values(x: Tensor) -> bool:
    """Return False for a tensor of shape alone: on the meta device, or fake."""
    return not x.is_meta and not isinstance(x, FakeTensor)


class _Float32:
    """The default dtype float32, for as long as any thread holds it. The last one restores what was there."""

    def __init__(self) -> None:
        self._lock, self._holders, self._before = threading.Lock(), 0, torch.float32

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if not self._holders:
                self._before = torch.get_default_dtype()
            self._holders += 1
            _set_default_dtype(torch.float32)
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders and torch.get_default_dtype() == torch.float32:
                    _set_default_dtype(self._before)


def _set_default_dtype(dtype: torch.dtype) -> None:
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)


_float32 = _Float32()
