"""Keep recorded rows in memory or in memory-mapped files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.base.arguments import Path as ArgumentPath
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import raw_bytes
from tfmq_fx.calibration.perturbed import Perturbation

INDEX = "rows.json"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A record of a network's arguments. Rows are (N, ...); shared tensors are the same in every call."""

    rows: dict[str, Tensor]
    constants: dict[str, Any]  # plain values, and shared tensors
    paths: dict[str, ArgumentPath]
    conditional: Tensor  # (N,) bool: False for a guided pipeline's unconditional rows
    repeats: dict[str, int]  # how often the network takes each row, if not once: a prompt for every frame
    perturbation: Perturbation | None = None
    others: Sequence[Mapping[str, Any]] = ()  # the constants of further kinds of calls, where they differ


class Sink:
    """A collector of rows: in memory up to `limit` bytes, beyond that in one file per tensor in `folder`."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.kept: list[dict[str, Tensor]] = []
        self.shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.bytes, self.rows, self.on_disk = 0, 0, False

    def append(self, rows: dict[str, Tensor]) -> None:
        """Add rows, (N, ...) each. Raises TFMQError if their names, types or shapes differ from those of earlier rows."""
        if self.shapes and rows.keys() != self.shapes.keys():
            wrong = sorted(rows.keys() ^ self.shapes.keys())[0]
            raise TFMQError(f"calibration: some calls of the network have {wrong!r} and some do not.")
        for name, x in rows.items():
            found, expected = (x.dtype, tuple(x.shape[1:])), self.shapes.get(name)
            if expected is not None and found != expected:
                raise TFMQError(
                    f"calibration: {name!r} has rows of {found[0]} {found[1]} after rows of {expected[0]} {expected[1]}; record "
                    "pictures of different sizes, or prompts of different lengths, separately."
                )
            self.shapes.setdefault(name, found)
        rows = {name: x.cpu() for name, x in rows.items()}  # a GPU has other things to hold
        self.rows += len(next(iter(rows.values())))
        self.bytes += sum(x.nbytes for x in rows.values())
        self.kept.append(rows)
        if self.on_disk or self.bytes > self.limit:
            self.flush()

    def flush(self) -> None:
        """Move the rows in memory to the files."""
        self.on_disk = True
        try:
            for i, name in enumerate(self.shapes):
                with (self.folder / f"{i}.bin").open("ab") as file:
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
        if not self.on_disk:
            # One tensor at a time is let go of, so that memory never holds all rows twice.
            return {n: torch.cat([rows.pop(n) for rows in self.kept]) for n in self.shapes}
        return {
            name: _mapped(self.folder / f"{i}.bin", dtype, (self.rows, *shape))
            for i, (name, (dtype, shape)) in enumerate(self.shapes.items())
        }


def _mapped(file: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = torch.Size(shape).numel()
    if file.stat().st_size != count * dtype.itemsize:
        raise TFMQError(
            f"{file}: has {file.stat().st_size} bytes, but {count * dtype.itemsize} are expected; remove its folder to record "
            "again."
        )
    return torch.from_file(str(file), size=count, dtype=dtype).reshape(*shape)


def read_recording(folder: Path) -> Recording:
    """Read a recording from a cache folder. Raises TFMQError if the folder has none that can be read."""
    try:
        index = json.loads((folder / INDEX).read_text())
        rows = {
            name: _mapped(folder / f"{i}.bin", getattr(torch, dtype), shape)
            for i, (name, dtype, shape) in enumerate(index["rows"])
        }
        shared = {
            n: torch.tensor(x, dtype=getattr(torch, dtype)) for n, (dtype, x) in index["shared"].items()
        }
        return Recording(
            rows=rows,
            constants={**index["constants"], **shared},
            paths={n: tuple(path) for n, path in index["paths"].items()},
            conditional=torch.tensor(index["conditional"], dtype=torch.bool),
            repeats=index["repeats"],
            others=index.get("others", ()),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TFMQError(
            f"{folder}: is not a readable recording ({error}); remove it to record again."
        ) from error
