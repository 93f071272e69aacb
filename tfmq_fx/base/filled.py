"""Follow tensors that hold known numbers while a network is traced, so that what it reads of them is no data.

mask = torch.ones(1, n)                        # one value everywhere; n: a size that moves
length = int(mask.sum())                       # n, and not a value that only a call knows
x[:, :length]; x[mask.bool()]; mask.nonzero()  # slices of x and a range, of known sizes
for h, w in torch.tensor([[n, m]]): x[:h * w]  # a few numbers
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.function_modes import FunctionMode

# By the names of torch's functions and methods. What makes a filled tensor: its value, or which argument has it.
_ONES, _ZEROS = ("ones", "ones_like", "new_ones"), ("zeros", "zeros_like", "new_zeros")
_FULL = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
# What only moves elements, or gives them another dtype; and what drops some, repeats them, or may round them.
_WHOLE = (
    "to", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous", "detach", "view", "reshape", "flatten", "unflatten", "unsqueeze",
    "squeeze", "transpose", "permute",
)  # fmt: skip
_MOVED = (
    *_WHOLE, "type", "int", "long", "expand", "expand_as", "repeat", "unbind", "select", "narrow", "chunk", "split", "cat", "concat", "stack",
    "__getitem__",
)  # fmt: skip
_POINTWISE: dict[str, Callable[..., Any]] = {
    "bool": bool, "logical_not": operator.not_,
    **{n: getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul")},
    "rsub": lambda a, b: b - a,
    "logical_and": lambda a, b: bool(a) and bool(b), "logical_or": lambda a, b: bool(a) or bool(b),
}  # fmt: skip
_BITWISE: dict[str, Callable[..., Any]] = {  # of tensors of bool
    "invert": operator.not_, "bitwise_not": operator.not_, "and": operator.and_, "or": operator.or_,
    "bitwise_and": operator.and_, "bitwise_or": operator.or_,
}  # fmt: skip
_NUMBERS: dict[str, Callable[..., Any]] = {
    "item": lambda x: x, "__index__": lambda x: x, "__int__": int, "__float__": float, "__bool__": bool,
}  # fmt: skip
_OWN = ("detach_", "requires_grad_")  # write nothing, for all their names
_WRITES = (
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__iand__",
    "__ior__",
    "__ixor__",
)


MOST_NUMBERS = 64  # of a tensor of several
_SHAPES = ("view", "reshape", "expand", "repeat", "unflatten")  # what takes sizes


class Filled(FunctionMode):
    """A mode that knows which tensors have one value everywhere, a number or a size that moves, and which are lists of a few.

    What a network reads of them as numbers is that value, and what it picks by them is a slice. Everything else is computed
    as without the mode.

    nonzero: the names of the arguments that are not 0 everywhere in the example. A network that asks whether one is gets that answer;
    `asked` has those of which it did.
    """

    def __init__(self, nonzero: Collection[str] = ()) -> None:
        super().__init__()
        self.nonzero, self.asked = frozenset(nonzero), set[str]()
        # -> an argument's name: of what is made of it by moving elements, and of whether it is 0, at each place or everywhere.
        self._arguments: Any = WeakIdKeyDictionary()
        self._zeros: Any = WeakIdKeyDictionary()
        self._known: Any = WeakIdKeyDictionary()
        self._several: Any = WeakIdKeyDictionary()  # -> an array of integers, of the tensor's shape

    def call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function makes of known tensors, or its own result, and know that if it can be."""
        first: Any = args[0] if args else None
        if (found := self._of_zeros(name, args)) is not None:
            return found
        if first in self and name in _NUMBERS and first.numel() == 1:
            return _NUMBERS[name](self._known[first])
        if first in self and name == "tolist" and all(isinstance(d, int) for d in first.shape):
            return _nested(self._known[first], first.shape)
        if first in self and name == "nonzero" and len(args) == 1 and first.dim() == 1:
            return self._nonzero(first, **kwargs)
        if name == "__getitem__" and isinstance(first, Tensor):
            if isinstance(mask := args[1], Tensor) and mask.dtype == torch.bool and mask in self:
                return self._picked(first, mask)
            args = (first, self._sliced(args[1]))
        if name in _SHAPES:
            args = (first, *pytree.tree_map(self._number, args[1:]))
        if isinstance(first, Tensor) and name == "tolist" and first in self._several:
            return self._several[first].tolist()
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and isinstance(first, Tensor):
            self._follow(name, args, kwargs, result)
        if name in _OWN:
            return result
        if (
            name in _WRITES
            or (name.endswith("_") and not name.endswith("__"))
            or kwargs.get("out") is not None
        ):
            self._forget(kwargs.get("out", first))
        elif name == "tensor" and isinstance(first, (list, tuple)):
            self._note(result, first)
        elif name == "stack" and isinstance(first, (list, tuple)) and all(self._is_number(x) for x in first):
            self._note(result, [self._known[x] for x in first])
        elif isinstance(first, Tensor) and first in self._several and name in _MOVED:
            self._move(func, args, kwargs, result)
        elif (value := self._value(name, args, kwargs)) is not None:
            for made in pytree.tree_leaves(result):
                if isinstance(made, Tensor) and (own := _as_held(value, made.dtype)) is not None:
                    self._known[made] = own
        return result

    def name_arguments(self, given: Mapping[str, Any]) -> None:
        """Note the tensors that a call gives, by the arguments' names."""
        for name, (_, x) in leaves(given).items():
            if isinstance(x, Tensor) and name in self.nonzero:
                self._arguments[x] = name

    def _of_zeros(self, name: str, args: tuple[Any, ...]) -> bool | None:
        """Return whether an argument is 0 everywhere, if that is what a function asks: it is not."""
        first = args[0] if args else None
        if (
            name not in ("__bool__", "item")
            or not isinstance(first, Tensor)
            or first.dim()
            or first not in self._zeros
        ):
            return None
        self.asked.add(self._zeros[first])
        return False

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what is made of an argument, or of where it is 0, that still tells whether it is 0 everywhere."""
        first, *rest = args
        if first in self._zeros:
            if name == "all" and not rest and not kwargs:
                self._zeros[result] = self._zeros[first]
        elif first not in self._arguments:
            return
        elif name in ("eq", "__eq__") and isinstance(rest[0], (int, float)) and rest[0] == 0:
            self._zeros[result] = self._arguments[first]
        elif result.is_floating_point() and (
            name in _WHOLE or (name == "__getitem__" and _is_first(rest[0]))
        ):
            self._arguments[result] = self._arguments[first]  # an integer of 0.3 would be 0

    def __contains__(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x in self._known

    def _is_number(self, x: Any) -> bool:
        """Return True for a tensor of shape () whose value is known."""
        return x in self and x.dim() == 0

    def _number(self, x: Any) -> Any:
        """Return the number that a tensor of shape () holds, if it is known, and everything else as it is."""
        return self._known[x] if self._is_number(x) else x

    def _note(self, x: Tensor, given: Any) -> None:
        """Know a tensor of integers by its values, nested as it is, as far as they are numbers and few."""
        values = pytree.tree_leaves(given)
        whole = all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in values)
        if x.dtype not in (torch.int32, torch.int64) or not whole or not 1 <= len(values) <= MOST_NUMBERS:
            return
        if len(values) == 1:
            self._known[x] = values[0]
        else:
            self._several[x] = np.array(values, dtype=object).reshape(tuple(x.shape))

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Know what is made of a tensor of several numbers by moving them: the same is done to their places."""
        values = self._several[args[0]]
        if any(isinstance(x, (Tensor, torch.SymInt)) for x in pytree.tree_leaves((args[1:], kwargs))):
            return
        kwargs = {n: x for n, x in kwargs.items() if n != "device"}
        with _disable_current_modes():
            moved = func(torch.arange(values.size).reshape(values.shape), *args[1:], **kwargs)
            places = [x.long().numpy() for x in pytree.tree_leaves(moved)]
        for x, where in zip(pytree.tree_leaves(result), places, strict=True):
            self._note(x, [values.flat[i] for i in where.flat])

    def _value(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value that a function's result has everywhere; None if it is not known to have one."""
        if name in _ONES + _ZEROS:
            return int(name in _ONES)
        if name in _FULL:
            given = args[_FULL[name]] if len(args) > _FULL[name] else kwargs.get("fill_value")
            return given if isinstance(given, (bool, int, float, torch.SymInt)) else None
        given = pytree.tree_leaves(args)
        tensors = [x for x in given if isinstance(x, Tensor)]
        if (
            not tensors
            or not all(x in self for x in tensors)
            or any(isinstance(x, Tensor) for x in kwargs.values())
        ):
            return None
        values = [self._known[x] for x in tensors]
        if name in _MOVED:
            return values[0] if all(_equal(v, values[0]) for v in values) else None
        if name == "pad":
            return values[0] if _equal(kwargs.get("value") or 0, values[0]) and len(args) == 2 else None
        if name in ("sum", "all", "any"):
            return self._reduced(name, *args, **kwargs)
        operation, bits = name.strip("_"), all(x.dtype == torch.bool for x in tensors)
        compute = _BITWISE.get(operation) if bits else None
        compute = compute or _POINTWISE.get(operation)
        numbers = [self._known[x] if isinstance(x, Tensor) else x for x in args]
        plain = all(isinstance(x, (bool, int, float, torch.SymInt)) for x in numbers)
        return compute(*numbers) if compute is not None and plain and not kwargs else None

    def _reduced(
        self,
        name: str,
        x: Tensor,
        dim: Any = None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> Any:
        del keepdim
        value = self._known[x] if dtype is None else _as_held(self._known[x], dtype)
        if name != "sum" or value is None:
            return None if value is None else bool(value)
        dims = range(x.dim()) if dim is None else dim if isinstance(dim, Sequence) else [dim]
        whole = int(value) if isinstance(value, (bool, float)) and value == int(value) else value
        return whole * math.prod(x.shape[d] for d in dims)

    def _sliced(self, index: Any) -> Any:
        """Return an index whose slices end at numbers, where they would end at filled tensors."""
        if isinstance(index, tuple):
            return tuple(map(self._sliced, index))
        ends = (index.start, index.stop, index.step) if isinstance(index, slice) else ()
        return (
            slice(*(self._known[e] if e in self else e for e in ends))
            if any(e in self for e in ends)
            else index
        )

    def _picked(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x[mask]: all of it, or nothing."""
        flat = x.flatten(0, mask.dim() - 1) if mask.dim() > 1 else x
        made = flat.clone() if self._known[mask] else flat[:0]
        if x in self:
            self._known[made] = self._known[x]
        return made

    def _nonzero(self, x: Tensor, as_tuple: bool = False) -> Any:
        found = torch.arange(x.shape[0] if self._known[x] else 0, device=x.device)
        return (found,) if as_tuple else found[:, None]

    def _forget(self, written: Any) -> None:
        """Know nothing any more of what shares memory with a tensor that was written to."""
        storages = {x.untyped_storage()._cdata for x in pytree.tree_leaves(written) if isinstance(x, Tensor)}
        for known in (self._known, self._several, self._arguments, self._zeros):
            for x in [x for x in known if x.untyped_storage()._cdata in storages]:
                del known[x]


def _is_first(index: Any) -> bool:
    """Return True for what picks the first row, or makes a batch of one: a network is traced so for one row."""
    return index is None or (isinstance(index, int) and index == 0)


def _as_held(value: Any, dtype: torch.dtype) -> Any:
    """Return a number as a tensor of this type holds it; None if it may be rounded."""
    if dtype == torch.bool:
        return bool(value)
    if dtype in (torch.int16, torch.int32, torch.int64):
        return torch.sym_int(value)
    plain = isinstance(value, (bool, int, float))
    if dtype in (torch.float32, torch.float64):
        return float(value) if plain else torch.sym_float(value)
    return float(value) if plain and value in (0, 1) else None


def _equal(a: Any, b: Any) -> bool:
    return a is b or bool(a == b)


def _nested(value: Any, shape: Sequence[int]) -> Any:
    return [_nested(value, shape[1:]) for _ in range(shape[0])] if shape else value
