"""Trace networks with torch.export: one thread at a time, and with errors that say in one sentence what failed."""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partialmethod
from operator import truediv
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._sympy.functions import FloatTrueDiv, IntTrueDiv

from tfmq_fx.base.errors import TFMQError, first_line

log = logging.getLogger(__name__)

_LOCK = threading.RLock()  # what is traced may trace again
_HERE = str(Path(__file__).parents[1]) + os.sep
_DATA_DEPENDENT = (GuardOnDataDependentSymNode, DynamicOutputShapeException, DataDependentOutputException)


@contextmanager
def tracing() -> Iterator[None]:
    """Let no other thread trace or compile until exit: torch.export and Inductor change the whole process.

    For use as a context or as a decorator.
    """
    with _LOCK:
        yield


@contextmanager
def graphs_to_log() -> Iterator[None]:
    """Log what this thread writes to stderr if an exception ends the context; else let it through.

    torch.export prints the whole graph of a network that it cannot capture.
    """
    with redirect_stderr(_OfThisThread(sys.stderr)) as written:
        try:
            yield
        except Exception:
            log.info("%s", written.getvalue())
            raise
    sys.stderr.write(written.getvalue())


class _OfThisThread(io.StringIO):
    """A buffer for one thread's text; what other threads write goes to `stream`."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream, self._owner = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self._owner else self._stream.write(text)


@contextmanager
def numpy_on_sizes() -> Iterator[None]:
    """Let numpy's functions take what is computed of a dynamic size, until exit: np.sqrt(n) calls n.sqrt().

    Where the size cancels, as in np.sqrt(a.numel() / b.numel()), the result is a number.
    """
    names = [n for n in _FUNCTIONS if hasattr(torch, f"_sym_{n}")]
    added = [(kind, n) for kind in (torch.SymFloat, torch.SymInt) for n in names if not hasattr(kind, n)]
    for kind, name in added:
        setattr(kind, name, partialmethod(_of_size, name))
    try:
        yield
    finally:
        for kind, name in added:
            delattr(kind, name)


@contextmanager
def symbolic_lengths(network: nn.Module, *, sets: bool = False, numbers: bool = False) -> Iterator[None]:
    """Let `len`, `set` with `sets`, `int` and `float` with `numbers`, work on dynamic sizes in the files of the network's classes.

    Python's own len(x) of a tensor and int(x) of a size are numbers, and its sets take no dynamic size. What is put in place of
    `set`, `int` and `float` are other types, which a network might ask for: use them where the graph is compared with the network.
    """
    new: dict[str, Any] = {"len": _length, **({"set": _Set} if sets else {}), **(NUMBERS if numbers else {})}
    placed = [(vars(f), n, value) for f in _files(network) for n, value in new.items() if n not in vars(f)]
    for names, name, value in placed:
        names[name] = value
    try:
        yield
    finally:
        for names, name, _ in placed:
            del names[name]


@contextmanager
def numbers_of_sizes(network: nn.Module) -> Iterator[list[str]]:
    """Yield the files of the network's classes that turn a dynamic size into a number, as int(x) and float(x) do, until exit.

    For use within `tracing`: it changes torch's classes.
    """
    own, found = {f.__file__ for f in _files(network)}, list[str]()

    def noted(kind: type, name: str, function: str) -> Callable[[Any], Any]:
        number = vars(kind)[name]

        def asked(size: Any) -> Any:
            code = sys._getframe(1).f_code
            if code.co_filename in own and function in code.co_names:
                found.append(code.co_filename)
            return number(size)

        return asked

    # float(n) of a size calls its __index__, as range(n) does.
    asks = [(torch.SymInt, "__int__", "int"), (torch.SymFloat, "__int__", "int"), (torch.SymInt, "__index__", "float"), (torch.SymFloat, "__float__", "float")]  # fmt: skip
    before = [vars(kind)[name] for kind, name, _ in asks]
    for ask in asks:
        setattr(*ask[:2], noted(*ask))
    try:
        yield found
    finally:
        for (kind, name, _), number in zip(asks, before, strict=True):
            setattr(kind, name, number)


def expect_same_rows(tensors: Sequence[Tensor]) -> None:
    """Tell a trace that all these tensors have as many rows.

    Where it finds out by itself, of products with a number of frames, it carries quotients of sizes along: a network for
    videos is then traced for minutes, and its rows may stay two sizes.
    """
    for x in tensors[1:]:
        torch._check(x.shape[0] == tensors[0].shape[0])


@contextmanager
def without_caches(network: nn.Module) -> Iterator[None]:
    """Let what functools caches in the files of the network's classes be computed anew, until exit.

    Such a cache would keep the tensors of a trace, which hold no values, and give them to the network's next call.
    """
    files = _files(network)
    owners = [
        *files,
        *(c for f in files for c in vars(f).values() if isinstance(c, type) and c.__module__ == f.__name__),
    ]
    cached = [
        (o, n, f) for o in owners for n, f in vars(o).items() if isinstance(f, functools._lru_cache_wrapper)
    ]
    for owner, name, function in cached:
        setattr(owner, name, function.__wrapped__)
    try:
        yield
    finally:
        for owner, name, function in cached:
            setattr(owner, name, function)


def _files(network: nn.Module) -> list[ModuleType]:
    """Return the Python modules that define a network's classes, apart from torch's."""
    names = {c.__module__: None for m in network.modules() for c in type(m).__mro__}
    own = [n for n in names if n in sys.modules and n.partition(".")[0] not in ("torch", "builtins")]
    return [sys.modules[n] for n in own]


def _length(x: Any) -> Any:
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else len(x)


class _IsNumber(type):
    """A type in place of Python's own of that name, which turns a dynamic size into another one by `of_size`."""

    own: type
    size: type  # of dynamic sizes that are such numbers outside of a trace
    of_size: Callable[[Any], Any]

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, (cls.own, cls.size))

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.own)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        of_size = len(args) == 1 and isinstance(args[0], (torch.SymInt, torch.SymFloat))
        return cls.of_size(args[0]) if of_size else cls.own(*args, **kwargs)


class _Int(int, metaclass=_IsNumber):
    own, size, of_size = int, torch.SymInt, torch.sym_int


class _Float(float, metaclass=_IsNumber):
    own, size, of_size = float, torch.SymFloat, torch.sym_float


NUMBERS: dict[str, Any] = {"int": _Int, "float": _Float}


class _IsSet(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, set)


class _Set(set[Any], metaclass=_IsSet):
    """Python's own set, but of dynamic sizes a list of those that differ."""

    def __new__(cls, values: Iterable[Any] = ()) -> Any:
        values = list(values)
        return _distinct(values) if any(isinstance(x, torch.SymInt) for x in values) else set(values)


def _distinct(values: list[Any]) -> list[Any]:
    """Return the values that differ from each other, in order. The trace notes which are equal."""
    found: list[Any] = []
    for x in values:
        if all(x != y for y in found):
            found.append(x)
    return found


_FUNCTIONS = ("sqrt", "log2", "sin", "cos", "tan", "sinh", "cosh", "tanh")


def _of_size(size: torch.SymInt | torch.SymFloat, name: str) -> Any:
    expression = size.node.expr.replace(IntTrueDiv, truediv).replace(FloatTrueDiv, truediv)
    known = sympy.cancel(expression)
    return getattr(math, name)(float(known)) if known.is_number else getattr(torch, f"_sym_{name}")(size)


def capture_error(name: str, error: Exception, *, runs: bool) -> TFMQError:
    """Return the error, in one sentence, for a network that torch.export cannot capture. torch's own text is logged.

    name: of the network's class. runs: True if the network computes something from the same inputs.
    """
    log.info("torch.export cannot capture %s", name, exc_info=error)
    what = f"{type(error).__name__}: {_words(error)}"
    if not runs:
        return TFMQError(f"{name} cannot run on the example inputs: {what} Give it what its forward takes.")
    return TFMQError(f"torch.export cannot capture {name}: {what} {_remedy(error)}")


def _remedy(error: Exception) -> str:
    remedy = "Change that part of the network"
    if isinstance(error, _DATA_DEPENDENT):
        remedy = "Remove the data-dependent control flow it names (torch.where, or a constant)"
    elif isinstance(error, UnsupportedOperatorException):
        remedy = "Register what that operator returns with torch.library.register_fake"
    return f"{remedy}, or hand the passes a torch.fx.GraphModule you captured yourself."


def _words(error: Exception) -> str:
    """Return the first line of an error's message, and the line of the network where it was raised."""
    text, first = str(error), first_line(error).rstrip(".")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    named = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.+)', text)
    where = [
        f"{f}:{line} in {function}: {code.strip()}" for f, line, function, code in named if not _is_library(f)
    ]
    where = where or [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in frames]
    return f"{first}. At {where[-1]}." if where else f"{first}."


def _is_library(file: str) -> bool:
    standard = os.path.dirname(os.__file__) + os.sep  # inspect's own frames say nothing of the network
    inside = file.startswith(standard) and f"{os.sep}site-packages{os.sep}" not in file
    return inside or f"{os.sep}torch{os.sep}" in file or file.startswith(("<", _HERE))
