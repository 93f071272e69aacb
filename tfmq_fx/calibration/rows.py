"""Keep recorded rows in memory or in memory-mapped files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.base.arguments import Path as ArgumentPath
from tfmq_fx.base.arguments import path_of_json, path_to_json
from tfmq_fx.base.arithmetic import dtype_name
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import raw_bytes
from tfmq_fx.base.masked_rows import lists_of_json
from tfmq_fx.base.row_lists import RowLists
from tfmq_fx.base.stand_ins import StandIn
from tfmq_fx.calibration.calls import same
from tfmq_fx.calibration.perturbed import Perturbation
from tfmq_fx.calibration.row_sizes import RowSizes, padded

INDEX = "rows.json"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A record of a network's arguments. Rows are (N, ...); shared tensors are the same in every call."""

    rows: dict[str, Tensor]
    constants: dict[str, Any]  # plain values, and shared tensors
    paths: dict[str, ArgumentPath]
    conditional: Tensor  # (N,) bool: False for a guided pipeline's unconditional rows
    repeats: dict[str, int]  # how often the network takes each row, if not once: a prompt for every frame
    folded: Collection[
        str
    ] = ()  # tensors with several entries for each row, which the network takes in one dimension
    perturbation: Perturbation | None = None
    others: Sequence[Mapping[str, Any]] = ()  # the constants of further kinds of calls, where they differ
    row_lists: RowLists | None = None
    row_sizes: RowSizes | None = None  # of rows that are padded
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)  # of tensors that some calls leave out
    idle: Collection[str] = ()  # objects that the network does nothing with


class Sink:
    """A collector of rows: in memory up to `limit` bytes, beyond that in one file per tensor in `folder`.

    even: the names of tensors whose rows have one size. Those of others may differ: they are padded with zeros, and `row_sizes`
        has their sizes.
    """

    def __init__(self, folder: Path, limit: float, *, even: Collection[str] = ()) -> None:
        self.folder, self.limit, self.even = folder, limit, even
        self.pieces: dict[str, list[tuple[int, ...]]] = {}  # the shapes of what was added of other tensors
        self.values: dict[str, list[Tensor]] = {}  # of tensors without rows, each once
        self.which: dict[str, list[Tensor]] = {}  # of each row, the number of its value
        self.kept: list[dict[str, Tensor]] = []
        self.shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.bytes, self.rows, self.on_disk = 0, 0, False

    def append(self, rows: dict[str, Tensor], shared: Mapping[str, Tensor] | None = None) -> None:
        """Add rows, (N, ...) each. Raises TFMQError if their names, types or shapes differ from those of earlier rows.

        shared: tensors without rows that are not the same in all calls.
        """
        if self.shapes and rows.keys() != self.shapes.keys():
            wrong = sorted(rows.keys() ^ self.shapes.keys())[0]
            raise TFMQError(f"calibration: some calls of the network have {wrong!r} and some do not.")
        for name, x in rows.items():
            found, expected = (x.dtype, tuple(x.shape[1:])), self.shapes.get(name)
            alike = expected is None or (found[0], len(found[1])) == (expected[0], len(expected[1]))
            if name not in self.even and alike:
                self.pieces.setdefault(name, []).append(tuple(x.shape))
            elif expected is not None and found != expected:
                raise TFMQError(
                    f"calibration: {name!r} has rows of {found[0]} {found[1]} after rows of {expected[0]} {expected[1]}; record "
                    "pictures of different sizes separately."
                )
            self.shapes.setdefault(name, found)
        rows = {name: x.cpu() for name, x in rows.items()}  # a GPU has other things to hold
        for name, x in (shared or {}).items():
            values = self.values.setdefault(name, [])
            which = next((i for i, value in enumerate(values) if same(value, x.cpu())), len(values))
            if which == len(values):
                values.append(x.cpu())
            count = len(next(iter(rows.values())))
            self.which.setdefault(name, []).append(torch.full((count,), which))
        self.rows += len(next(iter(rows.values())))
        self.bytes += sum(x.nbytes for x in rows.values())
        self.kept.append(rows)
        if self.on_disk or self.bytes > self.limit:
            self.flush()

    def flush(self) -> None:
        """Move the rows in memory to the files."""
        mode, self.on_disk = "ab" if self.on_disk else "wb", True
        try:
            for i, name in enumerate(self.shapes):
                with (self.folder / f"{i}.bin").open(mode) as file:
                    for rows in self.kept:
                        file.write(raw_bytes(rows[name]))
        except OSError as error:
            raise TFMQError(
                f"calibration: the rows cannot be written to {self.folder} ({error.strerror or error}); record fewer samples, or "
                "use another folder."
            ) from error
        self.kept.clear()

    def finish(self) -> dict[str, Tensor]:
        """Return all rows by name, (N, ...) each, memory-mapped if they are in files."""
        differ = self._differing()
        if not self.on_disk:
            # One tensor at a time is let go of, so that memory never holds all rows twice.
            return {
                n: (padded if n in differ else torch.cat)([rows.pop(n) for rows in self.kept])
                for n in self.shapes
            }
        return {
            name: self._padded(i, name, dtype)
            if name in differ
            else _mapped(self.folder / f"{i}.bin", dtype, (self.rows, *shape))
            for i, (name, (dtype, shape)) in enumerate(self.shapes.items())
        }

    @property
    def row_sizes(self) -> RowSizes | None:
        """Return the sizes of the rows of the tensors that are padded, and the tensors without rows that differ; None if there are none."""
        sizes = {
            n: torch.tensor([s[1:] for s in self.pieces[n] for _ in range(s[0])]) for n in self._differing()
        }
        shared = {n: torch.cat(which) for n, which in self.which.items()}
        return RowSizes(sizes, shared, self.values) if sizes or shared else None

    def _differing(self) -> list[str]:
        return [n for n, shapes in self.pieces.items() if len({s[1:] for s in shapes}) > 1]

    def _padded(self, number: int, name: str, dtype: torch.dtype) -> Tensor:
        """Rewrite a file of rows of different sizes as one of padded rows, and map it."""
        file, shapes = self.folder / f"{number}.bin", self.pieces[name]
        counts = [torch.Size(s).numel() for s in shapes]
        flat = _mapped(file, dtype, (sum(counts),))
        pieces = [x.view(s) for x, s in zip(flat.split(counts), shapes, strict=True)]
        shape = (self.rows, *map(max, zip(*(s[1:] for s in shapes), strict=True)))
        whole = torch.from_file(
            str(file.with_suffix(".padded")), shared=True, size=torch.Size(shape).numel(), dtype=dtype
        )
        padded(pieces, out=whole.view(shape))
        file.with_suffix(".padded").replace(file)
        return whole.view(shape)


def _mapped(file: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = torch.Size(shape).numel()
    if file.stat().st_size != count * dtype.itemsize:
        raise TFMQError(
            f"{file}: has {file.stat().st_size} bytes, but {count * dtype.itemsize} are expected; remove its folder to record "
            "again."
        )
    return torch.from_file(str(file), size=count, dtype=dtype).reshape(*shape)


def write_recording(found: Recording, folder: Path) -> None:
    """Write what `read_recording` needs beside the files of the rows. Raises TFMQError for arguments that JSON cannot hold."""
    tensors = {n: x for n, x in found.constants.items() if isinstance(x, Tensor)}
    plain = {n: x for n, x in found.constants.items() if n not in tensors}
    index = {
        "rows": [[n, dtype_name(x.dtype), list(x.shape)] for n, x in found.rows.items()],
        "constants": plain,
        "shared": {n: _to_json(x) for n, x in tensors.items()},
        "paths": {n: path_to_json(path) for n, path in found.paths.items()},
        "conditional": found.conditional.int().tolist(),
        "repeats": found.repeats,
        "folded": list(found.folded),
        "others": list(found.others),
        "row_sizes": _sizes_to_json(found.row_sizes),
        "stand_ins": {n: x.to_json() for n, x in found.stand_ins.items()},
        "idle": list(found.idle),
        "row_lists": None if found.row_lists is None else found.row_lists.to_json(),
    }
    try:
        text = json.dumps(index)
    except TypeError as error:
        raise TFMQError(
            f"calibration: a call has an argument that cannot be cached ({error}); record without cache=."
        ) from error
    (folder / INDEX).write_text(text)


def _to_json(x: Tensor) -> list[Any]:
    return [dtype_name(x.dtype), x.tolist()]


def _of_json(found: Sequence[Any]) -> Tensor:
    dtype, values = found
    return torch.tensor(values, dtype=getattr(torch, dtype))


def _sizes_to_json(sizes: RowSizes | None) -> list[Any] | None:
    if sizes is None:
        return None
    of = {n: x.tolist() for n, x in sizes.of.items()}
    shared = {n: [x.tolist(), [_to_json(v) for v in sizes.values[n]]] for n, x in sizes.shared.items()}
    return [of, shared]


def _sizes_of_json(found: Sequence[Any] | None) -> RowSizes | None:
    if found is None:
        return None
    of, shared = found
    return RowSizes(
        {n: torch.tensor(x) for n, x in of.items()},
        {n: torch.tensor(which) for n, (which, _) in shared.items()},
        {n: [_of_json(v) for v in values] for n, (_, values) in shared.items()},
    )


def read_recording(folder: Path) -> Recording:
    """Read a recording from a cache folder. Raises TFMQError if the folder has none that can be read."""
    try:
        index = json.loads((folder / INDEX).read_text())
        rows = {
            name: _mapped(folder / f"{i}.bin", getattr(torch, dtype), shape)
            for i, (name, dtype, shape) in enumerate(index["rows"])
        }
        shared = {n: _of_json(x) for n, x in index["shared"].items()}
        return Recording(
            rows=rows,
            constants={**index["constants"], **shared},
            paths={n: path_of_json(path) for n, path in index["paths"].items()},
            conditional=torch.tensor(index["conditional"], dtype=torch.bool),
            repeats=index["repeats"],
            folded=index["folded"],
            others=index["others"],
            row_sizes=_sizes_of_json(index["row_sizes"]),
            row_lists=None if (lists := index["row_lists"]) is None else lists_of_json(lists),
            stand_ins={n: StandIn(*x) for n, x in index["stand_ins"].items()},
            idle=index["idle"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TFMQError(
            f"{folder}: is not a readable recording ({error}); remove it to record again."
        ) from error
