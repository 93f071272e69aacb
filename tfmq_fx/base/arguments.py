"""Convert a network's nested arguments to flat, named leaves, and back.

{"sample": x, "added_cond_kwargs": {"time_ids": y}}  <->  ("sample",): x, ("added_cond_kwargs", "time_ids"): y
The flat name of a leaf joins its path with "_", as torch.export names its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tfmq_fx.base.errors import TFMQError

Path = tuple[str | int, ...]


class InTuple(int):
    """A step into a tuple. Other integer steps are into lists: networks tell (1, 64, 64), a size, from [..], several."""


class InDict(int):
    """A step into a dict whose keys are numbers, such as those of the layers that something is added to."""


def leaves(arguments: Mapping[str, Any]) -> dict[str, tuple[Path, Any]]:
    """Return flat name -> (path, value) for every leaf that is not None.

    Raises TFMQError when two leaves share a flat name.
    """
    found: dict[str, tuple[Path, Any]] = {}
    for path, value in walk(arguments):
        if value is None:
            continue
        name = flat_name(path)
        if name in found:
            raise TFMQError(
                f"arguments: {'.'.join(map(str, path))} and {found[name][0]} share the flat name {name!r}; rename one of them."
            )
        found[name] = (path, value)
    return found


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and value of every leaf of dicts, lists and tuples, None included."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, (*path, InDict(key) if type(key) is int else key))
    elif isinstance(value, (list, tuple)):
        step = int if isinstance(value, list) else InTuple
        for i, item in enumerate(value):
            yield from walk(item, (*path, step(i)))
    else:
        yield path, value


def flat_name(path: Path) -> str:
    """Return the name of the leaf at `path`, as torch.export names its inputs."""
    return "_".join(map(str, path))


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Invert `leaves`: build the nested arguments from leaves given by path, with what integer steps are into."""
    root: dict[str, Any] = {}
    for path, value in flat.items():
        at: dict[Any, Any] = root
        for step in path[:-1]:
            at = at.setdefault(step, {})
        at[path[-1]] = value
    return {name: _lists(value) for name, value in root.items()}


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = {k: _lists(v) for k, v in value.items()}
    if not items or not all(isinstance(k, int) for k in items):
        return items
    if isinstance(first := next(iter(items)), InDict):
        return {int(i): x for i, x in items.items()}
    found = [items[i] for i in sorted(items)]
    return tuple(found) if isinstance(first, InTuple) else found


def path_to_json(path: Path) -> list[Any]:
    """Return a path as JSON can hold it: a step into a tuple is a list of one, and a number that is a dict's key a list of two."""
    marks: dict[type, list[Any]] = {InTuple: [], InDict: ["key"]}
    return [[*marks[type(s)], int(s)] if type(s) in marks else s for s in path]


def path_of_json(found: list[Any]) -> Path:
    """Return what `path_to_json` gave."""
    kinds = {1: InTuple, 2: InDict}
    return tuple(kinds[len(step)](step[-1]) if isinstance(step, list) else step for step in found)
