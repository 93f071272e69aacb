"""What an export wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tfmq_fx.base.errors import TFMQError


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what is known of how it will run."""

    format: str  # a key of SUFFIXES
    file: Path  # or folder
    bytes: int  # of all files together
    seconds: float
    weights: Mapping[str, int] = field(default_factory=dict)  # "int4" -> how many weights are stored so
    kernels: Mapping[str, int] = field(
        default_factory=dict
    )  # "int8", "float" -> layers, where the file fixes it
    notes: tuple[str, ...] = ()  # what somebody who expects int8 everywhere should know


def fallen_back(
    kernels: Mapping[str, int], wanted: int, *, strict: bool, because: str = ""
) -> tuple[str, ...]:
    """Words for the quantized layers that run in float. Raises TFMQError of them when `strict`."""
    fallen = wanted - kernels["int8"]
    if fallen <= 0:
        return ()
    words = f"{fallen} of {wanted} quantized layers run in float{because}"
    if strict:
        raise TFMQError(f"strict: {words}.")
    return (words,)
