"""Keep what a pipeline reads of the float network: its modules' classes and plain attributes, without weights.

Facts are plain JSON values: path of a module -> name of an attribute -> value. An object that is no module but is of
a class of diffusers, such as an attention processor, has the path of the attribute that holds it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.artefact.plain import is_json
from tfmq_fx.base.ambient import has_values
from tfmq_fx.base.arithmetic import dtype_name
from tfmq_fx.base.errors import TFMQError

CLASS = "__class__"  # the attribute that holds the qualified name of a class
TENSOR = "__tensor__"  # the key of a tensor's values, beside its "dtype"
LIBRARIES = ("diffusers.", "torch.nn.")  # an artefact must not decide to import anything else
MOST_VALUES = 4096  # of a tensor that counts as an attribute: one for each feature. Larger ones are weights.
WALKS = (
    "children",
    "named_children",
    "modules",
    "named_modules",
    "get_submodule",
)  # of the float network's modules
_MISSING = object()


class Facts:
    """The facts of a network, and the tree of its modules.

    of: the plain values. children: path of a module -> names of the modules in it. other: facts of the objects that a
    pipeline sets while it samples, by path; None for none.
    """

    def __init__(
        self, of: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.of, self.children = of, dict[str, list[str]]()
        self.swapped = frozenset(other or ())
        self.other = None if not other else Facts({**of, **other})
        for path in of:
            if path and issubclass(self.class_of(path), nn.Module):
                parent, _, name = path.rpartition(".")
                self.children.setdefault(parent, []).append(name)

    def has(self, name: str) -> bool:
        """Return True if the network itself had an attribute or a module of this name."""
        return name in self.of or name in self.of.get("", {})

    def holders(self) -> list[str]:
        """Return the paths of the modules that hold an object, such as an attention processor."""
        found = (
            path.rpartition(".")[0] for path in self.of if not issubclass(self.class_of(path), nn.Module)
        )
        return list(dict.fromkeys(path for path in found if path))

    def class_of(self, path: str) -> type:
        """Return the class of a module or object; nn.Module if the installed libraries have none of its name."""
        return _class(self.of.get(path, {}).get(CLASS))


def facts_of(network: nn.Module, weights: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the facts of a network's modules, and of the objects that they hold.

    weights: the names of the tensors that the network computes with. Of the others, such as the statistics with which
        a pipeline scales what the network returns, small ones are facts too.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, module in network.named_modules():
        found[path] = facts_of_object(module)
        if (
            path
            and isinstance(config := getattr(module, "config", None), Mapping)
            and _is_plain(dict(config))
        ):
            found[path]["config"] = dict(config)
        for name, value in vars(module).items():
            if not name.startswith("_") and class_name(value) is not None:
                found[_join(path, name)] = facts_of_object(value)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        path, _, attribute = name.rpartition(".")
        known = name not in weights and value.numel() <= MOST_VALUES and has_values(value)
        if known and bool(value.isfinite().all()):
            found[path][attribute] = {
                TENSOR: value.tolist(),
                "dtype": dtype_name(value.dtype),
            }
    return found


def facts_of_object(value: Any) -> dict[str, Any]:
    """Return the class and the plain attributes of a module or another object."""
    found = {
        n: x for n, x in vars(value).items() if not n.startswith("_") and n != "training" and _is_plain(x)
    }
    if isinstance(value, nn.Module):  # a module that is None is registered, too
        found |= {
            n: x
            for part in (value._modules, value._parameters, value._buffers)
            for n, x in part.items()
            if x is None
        }
    return found if (name := class_name(value)) is None else {CLASS: name, **found}


def _is_plain(value: Any) -> bool:
    """Return True if JSON can hold the value."""
    if isinstance(value, Mapping):
        return all(isinstance(n, str) and _is_plain(x) for n, x in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(x) for x in value)
    return is_json(value)


def class_name(value: Any) -> str | None:
    """Return the qualified name of an object's class, or None if no library that is known here has it."""
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return name if name.startswith(LIBRARIES) and hasattr(value, "__dict__") and "<" not in name else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@functools.cache
def _class(name: str | None) -> type:
    """Return a class by its qualified name; nn.Module if there is none of this name in the installed libraries."""
    module, _, attribute = (name or "").rpartition(".")
    if module.startswith(LIBRARIES):
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            found = None
        if isinstance(found, type):
            return found
    return nn.Module


@functools.cache
def stand_in(own: type, other: type) -> type:
    """Return what `__class__` is for an instance of `own` that stands in for one of the class `other`.

    It is a subclass of both, so that `isinstance` is True for both, and has the name of `own`. It makes no instances:
    `type` of the instance stays `own`, and so do its methods.
    """
    if issubclass(own, other):
        return own
    return type(own.__name__, (own, other), {"__module__": own.__module__, "__doc__": own.__doc__})


class FloatModule:
    """A read-only view of one of the float network's modules, or of an object that it held.

    It has the plain attributes, the children and the class of the original. The methods of that class run on the
    view. So they compute what depends on attributes alone, and a method that needs weights or changes something
    raises an error: AttributeError for what is not kept, TFMQError for a change.

    facts: of the whole network. path: of the module; "" for the network itself.
    network: what stands in for the float network. The view with the path "" has its methods and attributes, too.
    """

    def __init__(self, facts: Facts, network: nn.Module, path: str = "") -> None:
        vars(self).update(_facts=facts, _network=network, _path=path)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._facts.class_of(self._path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        own, inner = self._facts.of.get(self._path, {}), _join(self._path, name)
        if name in own:
            return _read(name, own[name], self._network)
        if inner in self._facts.of:
            other = inner in self._facts.swapped and inner in self._network.placed
            return FloatModule(self._facts.other if other else self._facts, self._network, inner)
        if name == "_modules":
            return {n: getattr(self, n) for n in self._facts.children.get(self._path, ())}
        if (
            not self._path
            and name not in WALKS
            and (name in vars(self._network) or hasattr(type(self._network), name))
        ):
            return getattr(self._network, name)
        found = inspect.getattr_static(self.__class__, name, _MISSING)
        if found is _MISSING:
            raise AttributeError(
                f"a quantized network keeps only the plain attributes of the float network's modules; {inner!r} is not one of them"
            )
        return found.__get__(self, self.__class__) if hasattr(type(found), "__get__") else found

    def __setattr__(self, name: str, value: Any) -> None:
        inner = _join(self._path, name)
        if inner in self._facts.swapped and any(
            _same(FloatModule(f, self._network, inner), value) for f in (self._facts, self._facts.other)
        ):
            self._network.place(inner, other=not _same(FloatModule(self._facts, self._network, inner), value))
        elif not self._path and not self._facts.has(name):
            setattr(self._network, name, value)  # what is put on the network as a whole, such as hooks
        elif not _same(getattr(self, name, _MISSING), value):
            raise TFMQError(
                f"{inner}: a quantized network is fixed as it was captured, so it cannot be changed; change the float network and "
                "quantize that, or calibrate with a pipeline that changes it."
            )

    def __delattr__(self, name: str) -> None:
        if self._path or name not in vars(self._network):
            setattr(self, name, _MISSING)
        else:
            delattr(self._network, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise TFMQError(
            f"{self._path or 'the network'}: a quantized network has none of the float network's layers to call; call that one's."
        )

    def __getitem__(self, index: int | slice) -> Any:
        names = self._facts.children.get(self._path, [])
        if isinstance(index, slice):
            return [getattr(self, name) for name in names[index]]
        if not -len(names) <= index < len(names):
            raise IndexError(f"{self._path}[{index}]: the float network has {len(names)} modules there.")
        return getattr(self, names[index])

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self._facts.children.get(self._path, ()))

    def __len__(self) -> int:
        return len(self._facts.children.get(self._path, ()))

    def __bool__(self) -> bool:
        return not hasattr(self.__class__, "__len__") or len(self) > 0


def _read(name: str, value: Any, network: Any) -> Any:
    """Return an attribute's value as the float network had it."""
    if isinstance(value, Mapping) and TENSOR in value:
        return torch.tensor(value[TENSOR], dtype=getattr(torch, value["dtype"]), device=network.device)
    if name == "config" and isinstance(value, Mapping):
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(value)
    return value


def _same(before: Any, now: Any) -> bool:
    """Return True if an attribute is set to what it is: the same value, or an object of equal class and attributes."""
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return torch.equal(before, now)
    if type(now) is FloatModule or _is_plain(now) or class_name(now) is not None:
        return bool(_compared(before) == _compared(now))
    return False


def _compared(value: Any) -> Any:
    """Return a plain value or an object's facts, with lists for tuples, as JSON gives them back."""
    if type(value) is FloatModule:
        value = value._facts.of[value._path]
    elif class_name(value) is not None and not isinstance(value, Mapping):
        value = facts_of_object(value)
    if isinstance(value, Mapping):
        return {n: _compared(x) for n, x in value.items()}
    return [_compared(x) for x in value] if isinstance(value, (list, tuple)) else value
