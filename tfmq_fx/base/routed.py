"""Follow tokens that a network sends to a few of its experts, while it is traced: all experts get all tokens, by masks.

chosen = scores.topk(2).indices.view(-1)           # (tokens * 2,): which experts each token has
order = chosen.argsort()                           # the tokens' places, those of the first expert first
ends = chosen.bincount().cpu().numpy().cumsum(0)   # numbers that only a call knows
for expert, start, end in zip(experts, [0, *ends], ends):
    tokens = order[start:end] // 2
    y.scatter_add_(0, tokens[:, None].expand(-1, D), expert(x[tokens]) * weights[order[start:end]])

How many tokens an expert gets is data, and no graph has it as a number. This one has, instead, for each expert:

    mask = (chosen.view(-1, 2) == i)               # (tokens, 2)
    y += expert(x * mask.any(1)) * (weights.view(-1, 2) * mask).sum(1)

That is as many multiplications as if each token had all experts. Tokens that an expert lacks are zero, so that neither its
ranges nor its reconstruction sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.function_modes import FunctionMode

# By the names of torch's functions and methods: what gives a tensor's elements in the same order.
_MOVED = (
    "to", "type", "int", "long", "clone", "contiguous", "detach", "cpu", "cuda", "view", "reshape", "flatten", "unsqueeze", "squeeze",
    "expand", "expand_as", "repeat",
)  # fmt: skip
_QUOTIENTS = ("__floordiv__", "floor_divide", "div")
_SUMS = {"scatter_add": None, "index_add": None, "scatter_reduce": "sum"}  # -> what it must be told, besides


@dataclass(frozen=True, eq=False)
class _Choice:
    """Which of `experts` experts each token has: indices (tokens, k)."""

    indices: Tensor
    experts: int
    masks: dict[tuple[int | None, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, part: _Order, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return 1 where a token has the part's expert, and 0 elsewhere: by choice, (tokens, k), and by token, (tokens,)."""
        at = part.expert, dtype
        if at not in self.masks:
            by_choice = torch.eq(self.indices, part.expert or 0).to(dtype)
            self.masks[at] = by_choice, by_choice.sum(1)
        return self.masks[at]


@dataclass(frozen=True, eq=False)
class _Order:
    """The places of a flat choice, (tokens * k,), by expert. tokens: those of the tokens, (tokens * k,), not of their choices.

    expert: whose part of it this is; None: everyone's.
    """

    choice: _Choice
    tokens: bool = False
    expert: int | None = None


@dataclass(frozen=True, eq=False)
class _Counts:
    """How many tokens each expert has, (experts,); `ends`: how many it and those before it have."""

    choice: _Choice
    ends: bool = False

    def numbers(self) -> list[Place]:
        return [Place(self.choice, 0 if self.ends else i, i + 1) for i in range(self.choice.experts)]


@dataclass(frozen=True, eq=False)
class Place:
    """How many tokens the experts first .. last - 1 have: a number that only a call knows, and taken not to be 0."""

    choice: _Choice
    first: int
    last: int

    def __add__(self, other: Any) -> Place:
        if isinstance(other, Place) and other.choice is self.choice and other.first == self.last:
            return Place(self.choice, self.first, other.last)
        if isinstance(other, Place) and other.choice is self.choice and other.last == self.first:
            return Place(self.choice, other.first, self.last)
        if isinstance(other, int) and other == 0:
            return self
        return NotImplemented

    __radd__ = __add__

    def __gt__(self, other: Any) -> bool:
        if isinstance(other, int) and other <= 0:
            return True
        return NotImplemented

    def __index__(self) -> int:
        raise TFMQError("the number of tokens that an expert has is data, and no graph has it as a number.")


class Routed(FunctionMode):
    """A mode in which an expert gets all tokens: its own, and zeros for the others. `used`: whether one did."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False
        self._known: Any = WeakIdKeyDictionary()

    def call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function makes of known tensors, or its own result, and know that if it can be."""
        first: Any = args[0] if args else None
        fact = self._known.get(first) if isinstance(first, Tensor) else None
        if fact is not None and (made := self._of_known(name, first, fact, args[1:], kwargs)) is not None:
            return made
        if name == "__getitem__" and isinstance(first, Tensor) and (part := self._part(args[1])) is not None:
            return self._taken(first, part)
        if name.removesuffix("_") in _SUMS and (added := self._added(name, args, kwargs)) is not None:
            return added
        result = func(*args, **kwargs)
        if name == "topk" and isinstance(first, Tensor):
            dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
            size = first.shape[-1]
            if dim in (-1, first.dim() - 1) and isinstance(size, int):
                self._known[result.indices] = _Choice(result.indices.flatten(0, -2), size)
        elif fact is not None and name in _MOVED:
            self._known[result] = fact
        return result

    def _added(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a sum with what an expert made of its tokens; None if it is another sum."""
        if len(args) < 4 or args[1] != 0 or not kwargs.keys() <= {"reduce", "include_self"}:
            return None
        total: Any = args[0]
        part, made = self._part(args[2]), args[3]
        reduce = args[4] if len(args) > 4 else kwargs.get("reduce")
        plain = reduce == _SUMS[name.removesuffix("_")] and kwargs.get("include_self", True)
        if part is None or not part.tokens or not plain:
            return None
        masked = self._masked(made, part)
        return total.add_(masked) if name.endswith("_") else total + masked

    def _part(self, x: Any) -> _Order | None:
        """Return which expert's part of an order a tensor is; None if it is none."""
        fact = self._known.get(x) if isinstance(x, Tensor) else None
        return fact if isinstance(fact, _Order) and fact.expert is not None else None

    def _of_known(
        self, name: str, x: Tensor, fact: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a function makes of a tensor that is known, where that is not what torch makes of it; None elsewhere."""
        if isinstance(fact, _Choice) and x.dim() == 1:
            if name == "bincount" and (*args, *kwargs.values()) in ((), (fact.experts,)):
                every = torch.arange(fact.experts, device=x.device)
                return self._note((x[:, None] == every).sum(0), _Counts(fact))
            if name == "argsort" and not args and not kwargs:
                return self._note(torch.argsort(x), _Order(fact))
        if isinstance(fact, _Order) and not fact.tokens:
            by = args[0] if args else None
            rounds = kwargs.get("rounding_mode", "floor") == "floor"
            if name in _QUOTIENTS and rounds and by == fact.choice.indices.shape[1]:
                return self._note(x // 1, replace(fact, tokens=True))
        if isinstance(fact, _Order) and fact.expert is None and name == "__getitem__":
            expert = _expert_of(args[0], fact.choice)
            if expert is not None:
                self.used = True
                return self._note(x[: fact.choice.indices.shape[0]], replace(fact, expert=expert))
        if isinstance(fact, _Counts):
            if name == "cumsum" and (args[0] if args else kwargs.get("dim")) in (0, -1) and not fact.ends:
                return self._note(x.cumsum(0), replace(fact, ends=True))
            if name == "tolist":
                return fact.numbers()
            if name == "numpy":
                return np.array(fact.numbers(), dtype=object)
            if name == "unbind":  # of a loop over it, or of FakeTensor.tolist
                return tuple(map(self._note, x.unbind(), fact.numbers()))
            if name == "__getitem__" and isinstance(args[0], int):
                return self._note(x[args[0]], fact.numbers()[args[0]])
        if isinstance(fact, Place) and name in ("item", "tolist", "__index__"):
            return fact
        return None

    def _note(self, x: Tensor, fact: Any) -> Tensor:
        self._known[x] = fact
        return x

    def _taken(self, x: Tensor, part: _Order) -> Any:
        """Return x[part] for all tokens, of which those that the expert lacks are 0."""
        if part.tokens:
            return self._masked(x, part)
        mask, _ = part.choice.mask(part, x.dtype)
        of_each = x.unflatten(0, (-1, mask.shape[1]))
        return (of_each * mask.reshape(*mask.shape, *[1] * (x.dim() - 1))).sum(1)

    def _masked(self, x: Tensor, part: _Order) -> Tensor:
        _, mask = part.choice.mask(part, x.dtype)
        return x * mask.reshape(-1, *[1] * (x.dim() - 1))


def _expert_of(index: Any, choice: _Choice) -> int | None:
    """Return whose tokens are in a slice of the order; None if it is not one expert's."""
    if not isinstance(index, slice) or index.step is not None:
        return None
    start, stop = index.start, index.stop
    before = (
        start.last if isinstance(start, Place) and start.first == 0 else 0 if start in (None, 0) else None
    )
    if not isinstance(stop, Place) or stop.first != 0 or stop.choice is not choice or stop.last - 1 != before:
        return None
    return before
