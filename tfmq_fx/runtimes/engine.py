"""Define what all engines share: settings, cache keys, networks for each shape of inputs, and results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tfmq_fx.artefact.graph_json import graph_to_json, tensors_of
from tfmq_fx.artefact.quantized_graph import QuantizedGraph
from tfmq_fx.base.arithmetic import ByteSums
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import update_with_tensors
from tfmq_fx.runtimes.layers import Kernel

LAYOUT = 4  # the version of a cache folder's content; a new number invalidates old caches


PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


class Engine(Protocol):
    """A compiled network. It takes the graph's inputs in order and nests its outputs as the graph does.

    Threads may call it at once. Each call returns its own outputs, which no later call overwrites.
    """

    seconds: dict[int, float]  # batch size -> seconds that compiling or loading for it took


T = TypeVar("T")
Shapes = tuple[tuple[int, ...], ...]


class PerShape(Generic[T]):
    """The last `KEPT` networks, each for one shape of inputs, made when it is first asked for.

    Threads may ask at once. Each network is made by one of them, and nobody waits for the making of another
    shape's.
    """

    KEPT = 4

    def __init__(self, make: Callable[[Sequence[Tensor]], T]) -> None:
        self.make = make
        self.made: OrderedDict[Shapes, T] = OrderedDict()
        self.seconds: dict[int, float] = {}  # batch size -> seconds that making the last one took
        self._lock = threading.Lock()  # held while the three dicts are read or changed, never while making
        self._making: dict[Shapes, threading.Lock] = {}

    def of(self, inputs: Sequence[Tensor]) -> T:
        """Return the network for inputs of these shapes."""
        shapes = shapes_of(inputs)
        with self._lock:
            if shapes in self.made:
                self.made.move_to_end(shapes)
                return self.made[shapes]
            making = self._making.setdefault(shapes, threading.Lock())
        with making:
            with self._lock:
                if shapes in self.made:  # another thread made it while this one waited
                    return self.made[shapes]
            start = time.perf_counter()
            network = self.make(inputs)
            with self._lock:
                self.made[shapes] = network
                self.seconds[max(s[0] for s in shapes if s)] = time.perf_counter() - start
                if len(self.made) > self.KEPT:
                    self.made.popitem(last=False)
                self._making.pop(shapes, None)
        return network

    def latest(self) -> T:
        """Return the network that was asked for last."""
        with self._lock:
            return next(reversed(self.made.values()))


def shapes_of(inputs: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(x.shape) for x in inputs)


def folder_for(inputs: Sequence[Tensor]) -> str:
    """Return the name of the folder, in a cache, of the network for inputs of these shapes."""
    return hashlib.sha256(json.dumps(shapes_of(inputs)).encode()).hexdigest()[:16]


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


_TENSOR = object()  # stands for a tensor in the nesting of a graph's outputs


class Nesting:
    """The nesting of a graph's outputs, for engines that return a flat list of tensors. It keeps no graph."""

    def __init__(self, gm: GraphModule) -> None:
        self._nested: Any = torch.fx.map_arg(gm.graph.output_node().args[0], lambda _: _TENSOR)  # type: ignore[arg-type, return-value]

    def of(self, flat: Sequence[Any]) -> Any:
        """Return these tensors nested as the graph's outputs are, with the constants among them."""
        return self._filled(self._nested, iter(flat))

    def _filled(self, value: Any, tensors: Iterator[Any]) -> Any:
        if isinstance(value, Mapping):
            return {k: self._filled(v, tensors) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(self._filled(v, tensors) for v in value)
        return next(tensors) if value is _TENSOR else value


def choose_precision(precision: str | None, *, has_bfloat16: bool) -> str:
    """Return `precision`, or the CPU's default for None. Raises TFMQError for bfloat16 on a CPU without it."""
    if precision == "bfloat16" and not has_bfloat16:
        raise TFMQError(f"precision={precision!r}: this CPU does not support it; use 'float32', or None.")
    return precision or ("bfloat16" if has_bfloat16 else "float32")


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
