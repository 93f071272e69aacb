"""Keep the float temporal block outside the network: it makes the features that the network has no table of.

    timestep, y -> network (tables in it) -> output                 every value is in a table
    timestep, y -> block -> features -> network without them        a timestep or value that is in none
    y -> block, at all timesteps at once -> table of the request    features that depend on more than finite inputs

The block is needed once for each request, so it can be in slower memory than the network.
"""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.known import unknown_values
from tfmq_fx.base.entries import packed
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fresh, set_buffer
from tfmq_fx.passes.clean.move_to_device import move_to_device

PLACES = ("cpu", "disk", "device")
MOST_ROWS = 1024  # rows of the block's inputs that are computed at once
PATIENCE = 3  # tables for one call each, after which conditioning is taken to change at every step
REQUEST_BYTES = 2**29  # of all requests' tables together, unless the user says otherwise


@dataclass(frozen=True)
class _Column:
    """Where one feature lies in a table's row, and what it is."""

    start: int
    end: int
    shape: tuple[int, ...]  # of one sample
    dtype: torch.dtype


class Outside:
    """The float temporal block of a network, and the tables that it made for the last requests.

    block: its inputs by name -> all temporal features. It gets copies of its weights where it moves.
    features: their names, in the block's order. taken: those that are inputs of the network; the network has the
        others.
    timestep: the name of that input. tables: input name -> its known values (K, ...), the timestep first.
    place: where the block's weights are: "cpu", "disk" (a memory-mapped file), or "device", which is the network's.
    most_bytes: of the tables of requests that are kept. The newest is kept however large it is.
    batch: the number of rows for which the network's own tables have the very values of its layers; None: any number.
    mapped: True if the block's weights are memory-mapped already.

    Several threads may call it at once. Raises TFMQError for an unknown place.
    """

    def __init__(
        self,
        block: GraphModule,
        *,
        features: Sequence[str],
        taken: Sequence[str],
        timestep: str,
        tables: Mapping[str, Tensor],
        place: str = "cpu",
        most_bytes: int = REQUEST_BYTES,
        batch: int | None = None,
        mapped: bool = False,
    ) -> None:
        require_place(place)
        self.features, self.taken, self.timestep = tuple(features), tuple(taken), timestep
        self.tables = {n: x.cpu() for n, x in tables.items()}
        self.place, self.most_bytes, self.batch = place, most_bytes, batch
        self.block = fresh(block)
        self._inputs = list(placeholders(block))
        self._lock = threading.Lock()
        # The features of one conditioning at every timestep, side by side: (T, F), on the network's device.
        self._requests: OrderedDict[bytes, Tensor] = OrderedDict()
        self._uses: OrderedDict[bytes, int] = OrderedDict()  # of the last tables made: calls that took them
        self._passed: set[bytes] = set()  # what the last call without a table asked for
        self._columns: list[_Column] = []  # of the taken features
        self._all_columns: list[_Column] = []
        self.evaluations = 0  # requests whose table was made
        if place == "cpu":
            self.to(torch.device("cpu"))
        elif place == "disk" and not mapped:
            self._map()
        _own(self.block, {n: x.detach() for n, x in tensors_of(self.block).items()})

    def __reduce__(self) -> Any:
        # Neither the lock nor the requests' tables are part of the value.
        more = {"timestep": self.timestep, "tables": self.tables}
        return _rebuilt, (self.block, {**self.settings(), **more})

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments that are plain values and not the network's, too."""
        return {
            "features": list(self.features),
            "taken": list(self.taken),
            "place": self.place,
            "most_bytes": self.most_bytes,
            "batch": self.batch,
        }

    @property
    def size(self) -> int:
        """Return the bytes of the block's weights."""
        return sum(x.nbytes for x in tensors_of(self.block).values())

    @property
    def device(self) -> torch.device:
        return next(iter(tensors_of(self.block).values())).device

    def to(self, device: torch.device) -> None:
        """Move the block's weights, and what its graph makes, to a device."""
        to_device(self.block, device)

    def follow(self, device: torch.device) -> None:
        """Let the network be on another device: the block moves if that is its place, and tables are forgotten."""
        with self._lock:
            self._requests.clear()
        if self.place == "device":
            self.to(device)

    def _map(self) -> None:
        """Put the weights into a memory-mapped file. On Linux, it stays readable after it is deleted."""
        self.to(torch.device("cpu"))
        with tempfile.TemporaryDirectory(prefix="tfmq-block-") as folder:
            file = Path(folder) / "temporal_block.safetensors"
            save_file({n: x.contiguous() for n, x in tensors_of(self.block).items()}, file)
            _own(self.block, load_file(file))

    def block_on(self, device: torch.device) -> GraphModule:
        """Return the block on a device: itself, or a copy."""
        if device == self.device:
            return self.block
        copy = fresh(self.block)
        to_device(copy, device)
        return copy

    def taken_of(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the `taken` features of a call, computed as the network does."""
        features = dict(zip(self.features, self.evaluate(inputs), strict=True))
        return [features[n] for n in self.taken]

    def covers(self, inputs: Mapping[str, Tensor]) -> bool:
        """Return True if every timestep and finite value is in its table. inputs: those of the network by name."""
        return not any(len(unknown_values(inputs[n], table)[0]) for n, table in self.tables.items())

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return all features of a call, computed as the network does, on the inputs' device."""
        here = inputs[self.timestep].device
        given = (inputs[n].to(self.device) for n in self._inputs)
        return [feature.to(here) for feature in self.block(*given)]

    @torch.no_grad()
    def look_up(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the `taken` features of a call, from the tables of its rows' requests.

        inputs: those of the network by name; every timestep is in its table. A request is the conditioning of one
        row. A new one is evaluated at all timesteps; a known one has the same bytes. If the last tables served one call
        each, a new one is evaluated for this call alone, and at all timesteps when it comes again.
        """
        t = inputs[self.timestep]
        known = self.tables[self.timestep].to(t.device, torch.float64)
        step = (known - t.double().reshape(-1, 1)).abs().argmin(1)
        keys = self._keys(inputs, rows=len(t))
        with self._lock:
            tables = self._tables(keys, inputs) if self._pays(keys) else None
        if tables is None:
            return self.taken_of(inputs)
        distinct = dict.fromkeys(keys)
        if len(distinct) == 1:
            values = tables[keys[0]][step]
        else:
            own = step.reshape(len(t), -1)  # a sample may have several
            values = torch.cat([tables[key][i] for key, i in zip(keys, own.unbind(), strict=True)])
        return _apart(values, self._columns)

    def rounds_at(self, inputs: Mapping[str, Tensor]) -> bool:
        """Return True if the network's own tables differ from its layers in a call with so many rows.

        A CPU may sum the products of matrices in an order that depends on the number of rows.
        """
        t = inputs[self.timestep]
        has_tables = len(self.features) > len(self.taken) and len(self.tables) == 1
        plain = has_tables and t.dim() > 0 and t.device.type == self.device.type == "cpu"
        return plain and self.batch not in (None, len(t))

    @torch.no_grad()
    def at_rows(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return all features of a call as the layers compute them for so many rows. Those of a request mean nothing.

        Samples with several timesteps have room for the whole schedule, which is evaluated with the first of it.
        """
        t, found = inputs[self.timestep], []
        several = t.dim() > 1
        distinct, index = t.unique(return_inverse=True)
        wanted = torch.cat([distinct, self.tables[self.timestep].to(t)]).unique() if several else distinct

        def key_of(value: Tensor) -> bytes:
            return f"rows{len(t)}".encode() + value.reshape(1).view(torch.uint8).numpy().tobytes()

        with self._lock:
            missing = {key_of(x) for x in distinct} - self._requests.keys()
            new = [x for x in wanted if key_of(x) not in self._requests] if missing else []
            for part in torch.stack(new).split(t.numel() if several else 1) if new else ():
                filled = part[torch.arange(t.numel()) % len(part)].reshape(t.shape)
                made = self.evaluate({**inputs, self.timestep: filled})
                rows, self._all_columns = _side_by_side([feature[: len(part)] for feature in made])
                self._requests |= {key_of(x): row.clone() for x, row in zip(part, rows.split(1), strict=True)}
            for value in distinct:
                self._requests.move_to_end(key_of(value))
                found.append(self._requests[key_of(value)])
            self._forget()
        return _apart(torch.cat(found)[index.reshape(-1)], self._all_columns)

    @property
    def conditions(self) -> list[str]:
        """Return the block's inputs beside the timestep."""
        return [n for n in self._inputs if n != self.timestep]

    def _keys(self, inputs: Mapping[str, Tensor], *, rows: int) -> list[bytes]:
        """Return for each row of a call the bytes of its conditioning."""
        keys = [b""] * rows
        for name in self.conditions:
            x = inputs[name].detach()
            x = x.reshape(len(x), -1).expand(rows, -1) if x.dim() else x.expand(rows, 1)
            found = x.contiguous().view(torch.uint8).cpu().numpy()
            keys = [key + row.tobytes() for key, row in zip(keys, found, strict=True)]
        return keys

    def _pays(self, keys: list[bytes]) -> bool:
        """Return False for new conditioning where the last tables served one call each, unless it comes a second time."""
        new = {key for key in keys if key not in self._requests}
        wasted = len(self._uses) == PATIENCE and all(calls <= 1 for calls in self._uses.values())
        pays = not new or not wasted or new <= self._passed
        self._passed = set() if pays else new
        return pays

    def _tables(self, keys: list[bytes], inputs: Mapping[str, Tensor]) -> dict[bytes, Tensor]:
        """Return the tables of these requests, made if they are new, and forget the oldest over the budget."""
        new = [i for i, key in enumerate(keys) if key not in self._requests and key not in keys[:i]]
        if new:
            made = self._evaluated(new, inputs)
            self._requests |= {keys[i]: x for i, x in zip(new, made, strict=True)}
            self._uses |= dict.fromkeys((keys[i] for i in new), 0)
            while len(self._uses) > PATIENCE:
                self._uses.popitem(last=False)
        found = {}
        for key in dict.fromkeys(keys):
            self._uses |= {key: self._uses[key] + 1} if key in self._uses else {}
            self._requests.move_to_end(key)
            found[key] = self._requests[key]
        self._forget()
        return found

    def _forget(self) -> None:
        """Forget the oldest tables over the budget, but not the newest."""
        total = sum(table.nbytes for table in self._requests.values())
        while total > self.most_bytes and len(self._requests) > 1:
            total -= self._requests.popitem(last=False)[1].nbytes

    def _evaluated(self, rows: list[int], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return for each of these rows of a call the taken features at every timestep, side by side: (T, F)."""
        times, here = self.tables[self.timestep], inputs[self.timestep].device
        steps = len(times)
        chosen = torch.tensor(rows)
        given = {self.timestep: times.to(inputs[self.timestep].dtype).repeat(len(rows))}
        for name in self.conditions:
            x = inputs[name].to(self.device)
            # A row that stands for all is the first.
            given[name] = (
                x[chosen.clamp(max=len(x) - 1).to(x.device)].repeat_interleave(steps, 0) if x.dim() else x
            )
        whole, shape = {n: x for n, x in given.items() if not x.dim()}, inputs[self.timestep].shape[1:]
        where, size = None, MOST_ROWS
        if shape:  # several timesteps per sample
            given, where = packed({n: x for n, x in given.items() if n not in whole}, self.timestep, shape)
            size = max(1, MOST_ROWS // shape.numel())
        found: list[Tensor] = []
        for start in range(0, len(given[self.timestep]), size):
            part = {
                n: x[start : start + size].to(self.device) for n, x in given.items() if n not in whole
            } | whole
            features = dict(zip(self.features, self.block(*(part[n] for n in self._inputs)), strict=True))
            flat, self._columns = _side_by_side([features[n] for n in self.taken])
            found.append(flat.to(here))
        self.evaluations += len(rows)
        values = torch.cat(found)
        return list((values if where is None else values[where.to(here)]).split(steps))


def _side_by_side(features: list[Tensor]) -> tuple[Tensor, list[_Column]]:
    """Return features (R, ...) each as one (R, F), in a dtype that holds all of them, and where each lies in it."""
    columns, start = [], 0
    for x in features:
        width = x[0].numel()
        columns.append(_Column(start, start + width, tuple(x.shape[1:]), x.dtype))
        start += width
    return torch.cat([x.reshape(len(x), -1) for x in features], dim=1), columns


def _apart(values: Tensor, columns: Sequence[_Column]) -> list[Tensor]:
    """Return the features (N, ...) that lie side by side in rows (N, F)."""
    return [values[:, c.start : c.end].reshape(-1, *c.shape).to(c.dtype) for c in columns]


def _rebuilt(block: GraphModule, settings: dict[str, Any]) -> Outside:
    return Outside(block, **settings)


def require_place(place: str) -> None:
    """Raise TFMQError for an unknown place of a block."""
    if place not in PLACES:
        raise TFMQError(f"block={place!r}: is unknown; use one of {', '.join(PLACES)}.")


def to_device(block: GraphModule, device: torch.device) -> None:
    """Let a graph read its tensors, and make others, on a device. Those that it shares with others stay where they are."""
    _own(block, {n: x.detach().to(device) for n, x in tensors_of(block).items()})
    move_to_device(block, device=device)


def _own(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let a graph read these tensors, by path. The modules that it shared with others keep theirs."""
    for path, value in tensors.items():
        set_buffer(block, path, value)
