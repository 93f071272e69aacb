"""Define what all engines share: settings, cache keys and results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tfmq_fx.artefact.drop_in import QuantizedGraph
from tfmq_fx.artefact.graph_json import graph_to_json, tensors_of
from tfmq_fx.base.arithmetic import ByteSums
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files, update_with_tensors
from tfmq_fx.runtimes.layers import Kernel

LAYOUT = 2  # the version of a cache folder's content; a new number invalidates old caches


PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


class Engine(Protocol):
    """A compiled network. It takes the graph's inputs in order and nests its outputs as the graph does."""

    seconds: dict[int, float]  # batch size -> seconds that compiling or loading for it took


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """A request to an engine: the arguments of `lower`, and how this CPU sums products of bytes."""

    root: Path  # the folder of converted and compiled networks
    keep: bool  # True if the folder is a cache for later processes
    sums: ByteSums
    precision: str | None  # of everything that is not int8; None: bfloat16 if the CPU computes in it
    batch: int  # the batch size to compile for now
    compile: bool | None  # None: if possible
    pack: str | None


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The network that an engine made, and what it reports about it."""

    network: nn.Module  # an Engine
    kernels: list[Kernel]
    details: dict[str, Any]  # the engine's own entries of the report, as plain JSON values


def choose_precision(precision: str | None, *, has_bfloat16: bool) -> str:
    """Return `precision`, or the CPU's default for None. Raises TFMQError for bfloat16 on a CPU without it."""
    if precision == "bfloat16" and not has_bfloat16:
        raise TFMQError(f"precision={precision!r}: this CPU does not support it; use 'float32', or None.")
    return precision or ("bfloat16" if has_bfloat16 else "float32")


def remembered(file: Path, look: Callable[[], Any]) -> Any:
    """Return the result of `look`, kept as JSON in `file`, which later calls read instead.

    A compiled network that comes from the cache no longer knows all of it.
    """
    if not file.is_file():
        text = json.dumps(look())
        replace_files(file, lambda path: path.write_text(text))
    return json.loads(file.read_text())


def kernels_to_json(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(k) for k in kernels]


def cache_key(model: QuantizedGraph, engine: str) -> str:
    """Return a hash of what the converted network depends on: the graph, its tensors, and the versions.

    engine: the engine's version and the settings that change the conversion.
    """
    versions = [LAYOUT, torch.__version__, engine, version("tfmq_fx")]
    digest = hashlib.sha256(
        json.dumps([graph_to_json(model.network), model.interface.inputs, versions]).encode()
    )
    update_with_tensors(digest, sorted(tensors_of(model.network).items()))
    return digest.hexdigest()[:32]
