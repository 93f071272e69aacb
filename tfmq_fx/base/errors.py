"""The one exception users meet: it names the node, file or argument, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TFMQError(ValueError):
    """A mistake in what the user gave: message first line says which input, what was found, what to do."""


def nearest_names(name: str, known: Iterable[str]) -> str:
    """`known` as text for an error message, names like `name` first and at most eight of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=8, cutoff=0.3)
    shown = (close + [k for k in known if k not in close])[:8]
    return ", ".join(shown) + (", ..." if len(known) > len(shown) else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's words, cut where a value of the file makes it long."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
