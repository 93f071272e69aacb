"""Describe the result of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tfmq_fx.base.errors import TFMQError


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export: what was written, and what is known about how it will run."""

    format: str  # a key of SUFFIXES
    file: Path  # or folder
    bytes: int  # of all files together
    seconds: float
    weights: Mapping[str, int] = field(default_factory=dict)  # "int4" -> number of weights
    kernels: Mapping[str, int] = field(
        default_factory=dict
    )  # "int8", "float" -> number of layers, if the file determines it
    notes: tuple[str, ...] = ()  # warnings for users who expect int8 everywhere


def fallen_back(
    kernels: Mapping[str, int], wanted: int, *, strict: bool, because: str = "", layers: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return a note on the quantized layers that run in float, if any. Raises it as TFMQError if `strict`.

    kernels: its "int8" is the number of layers that run in int8. wanted: the number of quantized layers.
    because: text that gives the reason, appended to the note. layers: the names of those that are known, listed after it.
    """
    fallen = wanted - kernels["int8"]
    if fallen <= 0:
        return ()
    named = f": {', '.join(layers[:8])}{', ...' if len(layers) > 8 else ''}" if layers else ""
    words = f"{fallen} of {wanted} quantized layers run in float{because}{named}"
    if strict:
        raise TFMQError(f"strict: {words}.")
    return (words,)
