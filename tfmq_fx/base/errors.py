"""The one exception for user errors: it names the node, file or argument, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TFMQError(ValueError):
    """An error in the user's input. Its message's first line says which input, what was found, what to do."""


def require_type(value: object, expected: type | tuple[type, ...], argument: str, remedy: str) -> None:
    """Raise TFMQError, naming `argument`, unless `value` is an instance of `expected`. remedy: what to give instead."""
    if not isinstance(value, expected):
        names = " or ".join(t.__name__ for t in (expected if isinstance(expected, tuple) else (expected,)))
        found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TFMQError(f"{argument}: expected {names}, found {found}; {remedy}.")


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return at most eight `known` names as text for an error message, those similar to `name` first."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=8, cutoff=0.3)
    shown = (close + [k for k in known if k not in close])[:8]
    return ", ".join(shown) + (", ..." if len(known) > len(shown) else "")


def first_of(values: Sequence[float]) -> str:
    """Return at most eight values as text for an error message, and how many there are."""
    shown = ", ".join(f"{x:g}" for x in values[:8])
    return f"{shown}, ... ({len(values)} in all)" if len(values) > 8 else shown


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 200 characters: it may quote a long value."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
