"""Tell what of a network's attributes JSON can hold, and keep that."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tfmq_fx.base.arguments import flat_name, walk

log = logging.getLogger(__name__)


def is_object(value: Any) -> bool:
    """Return True for an object of some class of its own, which has attributes."""
    return hasattr(value, "__dict__") and not isinstance(value, Tensor)


def holds_tensors(value: Any, seen: set[int] | None = None) -> bool:
    """Return True if there are tensors in an object: in its attributes, in dicts and lists, and in what those hold."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return True
    if id(value) in seen or isinstance(value, type):
        return False
    seen.add(id(value))
    inner = list(getattr(value, "__dict__", {}).values())
    inner += (
        [*value.values()]
        if isinstance(value, Mapping)
        else [*value]
        if isinstance(value, (list, tuple, set))
        else []
    )
    return any(holds_tensors(x, seen) for x in inner)


def is_json(value: Any) -> bool:
    """Return True for a value that JSON holds: None, a word, a finite number."""
    return (
        math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, (int, str))
    )


def plain_config(network: nn.Module) -> dict[str, Any]:
    """Return the network's `.config` as JSON values; {} if it has none.

    It may be a dict, or an object with attributes: a namespace, a dataclass, a configuration of another library.
    What JSON cannot hold is left out and logged.
    """
    config = _plain(getattr(network, "config", None))
    found: dict[str, Any] = config if isinstance(config, dict) else {}
    left_out = [flat_name(path) for path, value in walk(found) if not is_json(value)]
    if left_out:
        log.info("config: JSON cannot hold %s; left out", ", ".join(left_out))
    kept: dict[str, Any] = _kept(found)
    return kept


def _plain(value: Any, depth: int = 4) -> Any:
    """Return dicts and lists for whatever has items or attributes, and anything else as it is."""
    if is_json(value) or depth == 0:
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v, depth - 1) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(v, depth - 1) for v in value]
    attributes = getattr(value, "__dict__", None)
    if not attributes or callable(value):
        return value
    return {k: _plain(v, depth - 1) for k, v in attributes.items()}


def _kept(value: Any) -> Any:
    """Return dicts without what JSON cannot hold; a list that has such an item is left out as a whole."""
    if not isinstance(value, dict):
        return value
    plain = {k: v for k, v in value.items() if isinstance(v, dict) or all(is_json(x) for _, x in walk(v))}
    return {k: _kept(v) for k, v in plain.items()}
