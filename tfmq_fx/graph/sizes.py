"""Which sizes of a captured graph's inputs may differ from those of the capture, and under which conditions.

A trace notes what it assumed of sizes it kept open: that two are equal, that one is even, which branch it took. A call
with other sizes computes what the network does as long as all of that holds. As each row is computed by itself, it is enough
that it holds for one row: frames * rows < 64 limits the frames alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fixed_size, meta_value

Size = tuple[str, int]  # an input's name and a dimension
Condition = Any  # as JSON holds it: a number, ["size", input, dimension], or [operation, condition, ..]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that may differ."""

    moving: Mapping[Size, int]  # -> the size at capture
    conditions: tuple[Condition, ...]  # what has to hold where one of them does


def sizes_of(gm: GraphModule, batch: int | torch.SymInt) -> Sizes:
    """Return the sizes of a graph's inputs, apart from the batch, that may differ from those of the capture.

    Left out are those for which the trace's own conditions allow no other value.
    """
    values = {n: v for n, p in placeholders(gm).items() if isinstance(v := meta_value(p), Tensor)}
    of_batch: set[Any] = batch.node.expr.free_symbols if isinstance(batch, torch.SymInt) else set()
    every = {(n, i): d for n, x in values.items() for i, d in enumerate(x.shape)}
    open_: dict[Size, Any] = {at: d for at, d in every.items() if fixed_size(d) is None}  # torch.SymInt
    names: dict[Any, Size] = {}  # sympy's symbols
    for at, d in open_.items():
        if d.node.expr.is_Symbol:
            names.setdefault(d.node.expr, at)
    batch_size = batch.node.hint if isinstance(batch, torch.SymInt) else batch
    # Also rows that the trace did not compare with the others.
    rows = {at for at, d in open_.items() if at[1] == 0 and d.node.hint == batch_size}
    moving = {
        at: int(d.node.hint)
        for at, d in open_.items()
        if not d.node.expr.free_symbols & of_batch
        and d.node.expr.free_symbols <= names.keys()
        and at not in rows
    }
    if not moving:
        return Sizes(moving={}, conditions=())
    found = _conditions(next(iter(open_.values())).node.shape_env, names, open_)
    now = {at: int(d.node.hint if isinstance(d, torch.SymInt) else d) for at, d in every.items()}
    conditions = tuple(one if holds(one := _of_one_row(c, rows), now) else c for c in found)
    unknown = {
        at for c in conditions if not holds(c, now) for at in sizes_in(c)
    }  # with a size that no input has
    moving = {at: size for at, size in moving.items() if at not in unknown}
    moving = {at: size for at, size in moving.items() if _moves(at, moving, now, conditions)}
    return Sizes(moving=moving, conditions=tuple(c for c in conditions if set(sizes_in(c)) & moving.keys()))


def _conditions(env: Any, names: Mapping[Any, Size], sizes: Mapping[Size, Any]) -> Iterator[Condition]:
    """Yield what the trace assumed of the sizes: its guards, their ranges, and which sizes are functions of others."""
    for expression in dict.fromkeys(env.replace(guard.expr) for guard in env.guards):
        yield _written(expression, names)
    for symbol, at in names.items():
        low, high = env.var_to_range[symbol].lower, env.var_to_range[symbol].upper
        yield ["GreaterThan", ["size", *at], int(low)]
        if high.is_Integer:
            yield ["LessThan", ["size", *at], int(high)]
    for at, d in sizes.items():
        if names.get(d.node.expr) != at:
            yield ["Equality", ["size", *at], _written(d.node.expr, names)]


def _of_one_row(condition: Condition, rows: Collection[Size]) -> Condition:
    """Return a condition for a call with one row. rows: the sizes that are the number of rows."""
    if not isinstance(condition, list):
        return condition
    if condition[0] == "size":
        return 1 if (condition[1], condition[2]) in rows else condition
    return [condition[0], *(_of_one_row(a, rows) for a in condition[1:])]


def _written(expression: Any, names: Mapping[Any, Size]) -> Condition:
    """Return a sympy expression as JSON can hold it."""
    if expression.is_Symbol:
        return ["size", *names[expression]] if expression in names else ["unknown"]
    if expression.is_Boolean and not expression.args:  # true or false
        return int(bool(expression))
    if expression.is_Integer:
        return int(expression)
    if expression.is_Number:
        return float(expression)
    return [expression.func.__name__, *(_written(a, names) for a in expression.args)]


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda *a: sum(a), "Mul": lambda *a: math.prod(a), "Pow": operator.pow, "PowByNatural": operator.pow,
    "Mod": operator.mod, "PythonMod": operator.mod, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b), "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv,
    "ToFloat": float, "FloorToInt": math.floor, "CeilToInt": math.ceil, "TruncToInt": math.trunc, "TruncToFloat": math.trunc,
    "FloatPow": operator.pow, "Max": max, "Min": min, "Abs": abs, "Not": operator.not_,
    "Equality": operator.eq, "Unequality": operator.ne, "LessThan": operator.le, "StrictLessThan": operator.lt,
    "GreaterThan": operator.ge, "StrictGreaterThan": operator.gt,
    "And": lambda *a: all(a), "Or": lambda *a: any(a),
}  # fmt: skip


def holds(condition: Condition, sizes: Mapping[Size, int]) -> bool:
    """Return True if a condition is known to hold for these sizes."""
    return bool(_known(condition, sizes))


def implied(sizes: Mapping[Size, int], conditions: Sequence[Condition]) -> dict[Size, int]:
    """Return sizes of which some were changed, with those that the conditions say are functions of others changed too."""
    found = dict(sizes)
    for condition in conditions:
        match condition:
            case ["Equality", ["size", name, i], other] if (value := _known(other, found)) is not None:
                found[name, i] = int(value)
    return found


def _known(condition: Condition, sizes: Mapping[Size, int]) -> Any:
    """Return the value of a condition or of a part; None if it is not known."""
    try:
        return _value(condition, sizes)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None


def _value(condition: Condition, sizes: Mapping[Size, int]) -> Any:
    if not isinstance(condition, list):
        return condition
    operation, *rest = condition
    if operation == "size":
        return sizes[rest[0], rest[1]]
    return _OPERATIONS[operation](*(_value(a, sizes) for a in rest))


def sizes_in(condition: Condition) -> Iterator[Size]:
    """Yield the sizes that a condition is about."""
    if isinstance(condition, list):
        if condition[0] == "size":
            yield condition[1], condition[2]
        for part in condition[1:]:
            yield from sizes_in(part)


_SIGNS = {
    "Add": " + ", "Mul": " * ", "Mod": " % ", "PythonMod": " % ", "FloorDiv": " // ", "CleanDiv": " // ", "Equality": " == ",
    "Unequality": " != ", "LessThan": " <= ", "StrictLessThan": " < ", "GreaterThan": " >= ", "StrictGreaterThan": " > ", "Or": " or ", "And": " and ",
}  # fmt: skip


def shown(condition: Condition) -> str:
    """Return a condition for people to read."""
    if not isinstance(condition, list):
        return str(condition)
    operation, *rest = condition
    if operation == "size":
        return f"{rest[0]}.shape[{rest[1]}]"
    parts = [f"({text})" if " " in (text := shown(a)) else text for a in rest]
    return _SIGNS[operation].join(parts) if operation in _SIGNS else f"{operation}({', '.join(parts)})"


def _moves(
    at: Size, moving: Mapping[Size, int], now: Mapping[Size, int], conditions: Sequence[Condition]
) -> bool:
    """Return True if the conditions allow another value of a size: of it alone, of all that were as large, or of all.

    A number of tokens is that of their positions too, and of their mask.
    """
    same = [other for other, size in moving.items() if size == moving[at]]
    about = [c for c in conditions if set(sizes_in(c)) & moving.keys()]
    for changed in ([at], same, [*moving]):
        for change in _CHANGES:
            sizes = {**now, **{other: change(now[other]) for other in changed}}
            if sizes[at] != now[at] and all(holds(c, sizes) for c in about):
                return True
    return False


# Of one more, a strided layer or a patch may take no notice.
_CHANGES: tuple[Callable[[int], int], ...] = (
    lambda n: 2 * n, lambda n: n + 8, lambda n: n + 2, lambda n: 4 * n, lambda n: n // 2,
)  # fmt: skip
