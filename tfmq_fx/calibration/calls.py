"""Record the calls of a network: copies of their arguments, and what all calls have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tfmq_fx.artefact.plain import is_json
from tfmq_fx.base.arguments import Path, flat_name, leaves, walk
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.signatures import named_arguments, parameters_of, signature_of
from tfmq_fx.calibration.perturbed import held

Call = dict[str, Any]  # a network's arguments by name, as it was given them
Leaves = dict[str, tuple[Path, Any]]  # flat name -> path and value
Flat = dict[str, Any]  # flat name -> value

# How many copies of an argument a new value is compared with. Guided pipelines call their network in turn with
# and without the condition, some with a third and a fourth.
RECENT = 4
MAX_KINDS = 4  # of calls whose plain arguments differ: each is computed for all rows of a call
ROWS = object()  # stands for a tensor with rows, which may differ from call to call


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Call]]:
    """Record the calls of `network`, in order, while the context is open.

    Each call is copied before the network runs, so that neither the network nor the sampling loop can change it
    afterwards. Calls share the copy of a tensor that they have in common (prompt embeddings).
    """
    calls: list[Call] = []
    signature, copies = signature_of(network), Copies()

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({n: copies.of(x, (n,)) for n, x in named_arguments(signature, args, kwargs).items()})

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def repeated(network: nn.Module) -> Iterator[list[Call]]:
    """Let `network` compute only its first call of each kind while the context is open, and repeat that call's output.

    Calls are of one kind if their arguments have the same shapes, and the network holds the same objects. The schedule of a sampling run is then the pipeline's own, and its
    samples mean nothing. Yields the calls' arguments, of which only the shapes hold.
    """
    made: dict[str, Any] = {}
    calls: list[Call] = []
    forward, own, signature = network.forward, vars(network).get("forward"), signature_of(network)

    def repeat(*args: Any, **kwargs: Any) -> Any:
        call = named_arguments(signature, args, kwargs)
        calls.append(call)
        kind = repr([(path, _kind(x)) for path, x in walk(call)] + [id(x) for x in held(network).values()])
        if kind not in made:
            made[kind] = forward(*args, **kwargs)
        return deepcopy(made[kind])  # the sampling loop may write to it

    repeat.__signature__, repeat.repeats = signature, forward  # type: ignore[attr-defined]
    network.forward = repeat
    try:
        yield calls
    finally:
        del network.forward
        if own is not None:
            network.forward = own


@contextmanager
def computing(network: nn.Module) -> Iterator[None]:
    """Let `network` compute each call while the context is open, also inside `repeated`."""
    repeat: Any = vars(network).get("forward")
    if not hasattr(repeat, "repeats"):
        yield
        return
    network.forward = repeat.repeats
    try:
        yield
    finally:
        network.forward = repeat


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


def first_overflow(network: nn.Module, call: Call) -> str | None:
    """Return the path of the first module that makes NaN or infinite values of finite ones in a call, if one does."""
    found: list[str] = []

    def look(module: nn.Module, given: Any, made: Any) -> None:
        if not found and finite(given) and not finite(made):
            found.append(names[module])

    names = {m: n for n, m in network.named_modules()}
    handles = [m.register_forward_hook(look) for m in names if not next(m.children(), None)]
    try:
        network(**call)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def overflow_words(layer: str, dtype: torch.dtype, when: str) -> str:
    """Return the sentence of an error: which layer's values overflow, and what to do."""
    remedy = (
        "load the network in bfloat16, whose range is that of float32"
        if dtype == torch.float16
        else "check the inputs"
    )
    return f"calibration: the values of {layer} overflow {str(dtype).removeprefix('torch.')} in {when} of the network; {remedy}."


def finite(values: Any) -> bool:
    """Return True if all floating-point tensors in an argument, however nested, are finite."""
    tensors = (x for _, x in walk(values) if isinstance(x, Tensor) and x.is_floating_point())
    return all(bool(x.isfinite().all()) for x in tensors)


class Copies:
    """A maker of copies. A tensor that equals a recent copy of the same argument is not copied again."""

    def __init__(self) -> None:
        self.recent: dict[Path, deque[Tensor]] = {}

    def of(self, value: Any, path: Path) -> Any:
        """Return a copy of an argument: of its tensors and arrays, and of the dicts and lists that hold them."""
        if isinstance(value, Mapping):
            return {key: self.of(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self.of(item, (*path, i)) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            return value.copy()
        return self._tensor(value.detach(), path) if isinstance(value, Tensor) else value

    def _tensor(self, x: Tensor, path: Path) -> Tensor:
        known = self.recent.setdefault(path, deque(maxlen=RECENT))
        for copy in known:
            if same(copy, x):
                return copy
        known.append(x.clone())
        return known[-1]


def same(a: Any, b: Any) -> bool:
    """Return True if two arguments have the same value; for tensors, also the same type, shape and device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    arrays = (Tensor, np.ndarray)
    return not isinstance(a, arrays) and not isinstance(b, arrays) and bool(a == b)


def defaults_of(network: nn.Module) -> dict[str, Any]:
    """Return the defaults of the network's arguments by name."""
    return {n: p.default for n, p in parameters_of(network).items() if p.default is not p.empty}


def call_leaves(call: Call, defaults: Mapping[str, Any]) -> Leaves:
    """Return the leaves of a call by flat name.

    A None is a leaf unless it is the argument's default: without it, the network would compute something else. So is an
    empty list or dict without a default (no pictures beside a prompt): without it, the network could not be called.
    """
    nones = [path for path, value in walk(call) if value is None]
    kept = [p for p in nones if len(p) > 1 or defaults.get(str(p[0]), ROWS) is not None]
    empty = {n: ((n,), x) for n, x in call.items() if n not in defaults and not any(True for _ in walk(x))}
    return leaves(call) | {flat_name(path): (path, None) for path in kept} | empty


def flat(call: Leaves) -> Flat:
    return {n: value for n, (_, value) in call.items()}


class UnlikeCallsError(TFMQError):
    """A tensor is given in some calls only, or has no rows and is not the same in all of them.

    name: its flat name. calls: two that differ in it, or one of them.
    """

    def __init__(self, name: str, calls: Sequence[Leaves], words: str) -> None:
        super().__init__(words)
        self.name, self.calls = name, tuple(calls)


class Constants:
    """The arguments that are the same in every call of a recording, or one of a few values that JSON can hold.

    values: those of the first call, by flat name. An argument that a call leaves out has its default there.
    others: those of each further kind of call that are others than the first's; None where a call lacks one.
    """

    def __init__(self, defaults: Mapping[str, Any], others: Sequence[Flat] | None = None) -> None:
        self.values: Flat = {}
        self.others: list[Flat] = list(others or ())
        self._kinds = MAX_KINDS - 1 if others is None else len(self.others)
        self._defaults = leaves(defaults)
        self._known: Flat | None = None  # all leaves of the first call, defaults included
        self._first: Leaves = {}
        self._calls = 0

    def take(self, call: Leaves, rows: Collection[str]) -> int:
        """Add the constants of a call, and return its kind: 0, or i for others[i - 1].

        rows: the names of its tensors that have rows, or are not the same in all calls.

        Raises UnlikeCallsError, with the argument's name and the numbers of the calls, for a tensor that is given in some
        calls only, or changes without having rows, and TFMQError for more kinds of calls than MAX_KINDS, or than were given.
        """
        self._calls += 1
        given = {path[0] for path, _ in call.values()}
        left_out = {n: value for n, (path, value) in self._defaults.items() if path[0] not in given}
        found = left_out | {n: ROWS if n in rows else value for n, (_, value) in call.items()}
        known = found if self._known is None else self._known
        names = [n for n in dict.fromkeys([*known, *found]) if n != "return_dict"]
        other = {n: found.get(n) for n in names if not _same_constant(known.get(n), found.get(n))}
        self._known = known
        self._first = self._first or call
        if other:
            return self._kind(other, known, call)
        self.values = {n: x for n, (_, x) in call.items() if n not in rows} | self.values
        return 0

    def _kind(self, other: Flat, known: Flat, call: Leaves) -> int:
        """Return the kind of a call whose constants are others than the first call's."""
        for name, now in other.items():
            if not is_json(now) or not is_json(known.get(name)):
                words = self._differs(name, known.get(name), now)
                raise UnlikeCallsError(name, (self._first, call), words)
        if other not in self.others:
            if len(self.others) == self._kinds:
                name, now = next(iter(other.items()))
                raise TFMQError(
                    f"calibration: {name!r} has no rows, but is {now!r} in call {self._calls} of the network after {self._kinds + 1} "
                    "other kinds of calls; change the pipeline's arguments so that it stays the same."
                )
            self.others.append(other)
        return self.others.index(other) + 1

    def _differs(self, name: str, before: Any, now: Any) -> str:
        here = f"call {self._calls}"
        earlier = "call 1" if self._calls == 2 else f"calls 1 to {self._calls - 1}"
        if before is None or now is None:
            with_it, without = (earlier, here) if now is None else (here, earlier)
            return (
                f"calibration: {name!r} is given in {with_it} of the network and not in {without}; change the pipeline's "
                "arguments so that it is in every call or in none."
            )
        return (
            f"calibration: {name!r} has no rows, but is {_shown(now)} in {here} of the network after {_shown(before)} in "
            f"{earlier}; change the pipeline's arguments so that it stays the same."
        )


def _same_constant(a: Any, b: Any) -> bool:
    return a is b or (a is not ROWS and b is not ROWS and same(a, b))


def _shown(value: Any) -> str:
    if value is ROWS:
        return "a tensor with rows"
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    return repr(value)
