"""What a network returns: its class, by name if it is one of diffusers', otherwise by its kind and its fields.

An artefact must not decide what is imported. So a class of the network's own code is not found again, but made
anew: with its name, its fields and its kind.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any

from tfmq_fx.base.errors import TFMQError

_KINDS = ("namedtuple", "dataclass", "mapping")  # the last: a dataclass that is a dict too


def describe_output(output: Any) -> tuple[str | None, tuple[str, ...]]:
    """Return the type of a network's output as plain values for `output_class`; None for tuples, lists, dicts, tensors.

    Returns a diffusers class's qualified name, or "<kind> <name>" and the names of the fields.
    """
    cls = type(output)
    if cls.__module__.startswith("diffusers."):
        return f"{cls.__module__}.{cls.__qualname__}", ()
    if isinstance(output, tuple) and hasattr(cls, "_fields"):
        return f"namedtuple {cls.__name__}", tuple(cls._fields)
    if dataclasses.is_dataclass(output):
        kind = "mapping" if isinstance(output, Mapping) else "dataclass"
        return f"{kind} {cls.__name__}", tuple(f.name for f in dataclasses.fields(output))
    return None, ()


@functools.cache
def output_class(name: str, fields: tuple[str, ...]) -> Any:
    """Return a class for outputs, from what `describe_output` returned.

    Raises TFMQError for any other class than one of diffusers' outputs, and for names that are no identifiers.
    """
    from diffusers.utils import BaseOutput

    kind, _, short = name.partition(" ")
    if kind in _KINDS:
        if not all(n.isidentifier() for n in (short, *fields)):
            raise TFMQError(f"config.json: output type {name!r} with fields {fields} has an invalid name.")
        if kind == "namedtuple":
            return collections.namedtuple(short, fields)
        optional: list[Any] = [(n, Any, dataclasses.field(default=None)) for n in fields]
        bases = (BaseOutput,) if kind == "mapping" else ()
        return dataclasses.make_dataclass(short, optional, bases=bases)
    module, _, attr = name.rpartition(".")
    if not module.startswith("diffusers."):
        raise TFMQError(f"config.json: output type {name!r} is not a diffusers class.")
    cls = getattr(importlib.import_module(module), attr, None)
    if not (isinstance(cls, type) and issubclass(cls, BaseOutput)):
        raise TFMQError(f"config.json: output type {name!r} is not a diffusers output.")
    return cls
