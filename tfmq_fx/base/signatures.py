"""Read how a network is called: its arguments, also where a wrapper takes whatever it passes on.

    Wrapper.forward(*args, **kwargs)  around  Network.forward(sample, timestep, y=None)  ==>  (sample, timestep, y=None)

Such wrappers are torch's compiled modules, DataParallel, and averages of weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from inspect import BoundArguments, Parameter, Signature
from types import MethodType
from typing import Any

from torch import nn

_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def hides_arguments(network: nn.Module) -> bool:
    """Return True for a network whose forward names no argument, as wrappers do."""
    kinds = [p.kind for p in inspect.signature(network.forward).parameters.values()]
    return bool(kinds) and all(kind in _VARIADIC for kind in kinds)


def signature_of(network: nn.Module) -> Signature:
    """Return the signature of a network's forward; for a wrapper, that of the network in it, or its `call_signature`.

    A wrapper's own signature is returned if the networks in it are called in different ways.
    """
    known = getattr(network, "call_signature", None)
    if isinstance(known, Signature):
        return known
    own = inspect.signature(network.forward)
    if not hides_arguments(network):
        return own
    found = [signature_of(m) for m in network.children()]
    return found[0] if found and all(list(s.parameters) == list(found[0].parameters) for s in found) else own


def parameters_of(network: nn.Module) -> dict[str, Parameter]:
    """Return the arguments that a network's forward names, in order; of `*args`, the name."""
    found = signature_of(network).parameters.values()
    return {p.name: p for p in found if p.kind is not Parameter.VAR_KEYWORD}


def takes_any(network: nn.Module) -> bool:
    """Return True if a network's forward has `**kwargs`."""
    return any(p.kind is Parameter.VAR_KEYWORD for p in signature_of(network).parameters.values())


def call_of(network: nn.Module, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `given` as the positional and the keyword arguments of a call of the network.

    given: the arguments by name, in the order of the signature; `*args` as a list. They are keyword arguments
        where the network takes them as such.
    """
    own = inspect.signature(network.forward).parameters
    named = {n for n, p in own.items() if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    anything = any(p.kind is Parameter.VAR_KEYWORD for p in own.values())
    taken = signature_of(network)
    listed = [n for n, p in taken.parameters.items() if p.kind is Parameter.VAR_POSITIONAL and given.get(n)]
    if not listed and (anything or given.keys() <= named):
        return (), dict(given)
    known = {n: x for n, x in given.items() if n in taken.parameters}
    extra = {n: x for n, x in given.items() if n not in known}
    bound = BoundArguments(taken, known)  # type: ignore[arg-type]
    return bound.args, {**bound.kwargs, **extra}


def named_arguments(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, those that only `**kwargs` takes among them."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    extra = next((n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    more = {} if extra is None else given.pop(extra, {})
    return given | more


def of_names(names: Iterable[str]) -> Signature:
    """Return the signature of a function that takes these arguments, by name or in this order."""
    return Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names])


def with_flag(signature: Signature, name: str) -> Signature:
    """Return a signature with one more argument, by keyword alone, whose default is None."""
    own = list(signature.parameters.values())
    at = len(own) - bool(own and own[-1].kind is Parameter.VAR_KEYWORD)
    new = Parameter(name, Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*own[:at], new, *own[at:]])


def with_forward(network: nn.Module, forward: Callable[..., Any], signature: Signature) -> nn.Module:
    """Return the same network, on the same tensors and modules, with another forward.

    forward: gets the network's own forward, and then the arguments.
    """
    view: nn.Module = object.__new__(type(network))
    vars(view).update(vars(network))
    own = vars(network).get("forward") or MethodType(type(network).forward, view)

    def new(*args: Any, **kwargs: Any) -> Any:
        return forward(own, *args, **kwargs)

    new.__signature__ = signature  # type: ignore[attr-defined]
    view.forward = new
    return view
