"""What every engine has in common: settings, cache, and what it returns."""

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

LAYOUT = 2  # of what a cache folder holds: another number reads none of the old


PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


class Engine(Protocol):
    """A compiled network: the graph's inputs in order, its outputs nested as the graph nests them."""

    seconds: dict[int, float]  # what compiling or loading for a batch took, by its size


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What an engine is asked for: `lower`'s arguments, and what this CPU does with bytes."""

    root: Path  # where converted and compiled networks lie
    keep: bool  # for the next process: the folder is a cache
    sums: ByteSums
    precision: str | None  # of what is not int8; None: bfloat16 where the CPU computes in it
    batch: int  # the size of batch to compile for now
    compile: bool | None  # None: where it can be
    pack: str | None


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What an engine made of a network."""

    network: nn.Module  # an Engine
    kernels: list[Kernel]
    details: dict[str, Any]  # the engine's own lines of the report, as plain JSON values


def choose_precision(precision: str | None, *, has_bfloat16: bool) -> str:
    if precision == "bfloat16" and not has_bfloat16:
        raise TFMQError(f"precision={precision!r}: this CPU does not compute in it; use 'float32', or None.")
    return precision or ("bfloat16" if has_bfloat16 else "float32")


def remembered(file: Path, look: Callable[[], Any]) -> Any:
    """What `look` finds, as JSON in a file: a compiled network from the cache has forgotten some of it."""
    if not file.is_file():
        text = json.dumps(look())
        replace_files(file, lambda path: path.write_text(text))
    return json.loads(file.read_text())


def kernels_to_json(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(k) for k in kernels]


def cache_key(model: QuantizedGraph, engine: str) -> str:
    """What the converted network depends on: the graph, its tensors, and the versions that convert it."""
    versions = [LAYOUT, torch.__version__, engine, version("tfmq_fx")]
    digest = hashlib.sha256(
        json.dumps([graph_to_json(model.network), model.interface.inputs, versions]).encode()
    )
    update_with_tensors(digest, sorted(tensors_of(model.network).items()))
    return digest.hexdigest()[:32]
