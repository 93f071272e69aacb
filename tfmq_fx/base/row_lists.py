"""Networks that take lists with one entry for each row, instead of tensors with a batch, and return such lists.

    network([x_0, x_1], t, [y_0, y_1]) -> [z_0, z_1]     ==>     network(x (N, ...), t (N,), y (N, ...)) -> (N, ...)

Which arguments are such lists is seen by calling the network with one row and with two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.signatures import call_of, signature_of, with_forward

NOISE = 2**-5  # relative: far above rounding in bfloat16
_ITSELF = -1  # the place of an output that is a list itself, and not a tuple or dict that holds one


@dataclass(frozen=True)
class RowLists:
    """What of a network's arguments and outputs are lists with one entry for each row.

    arguments: their names. outputs: their places among the outputs; -1 if the output itself is the list; none if they are not
    known yet. shared: the names of arguments that are the same for all rows, whatever their size.
    """

    arguments: tuple[str, ...]
    outputs: tuple[int, ...]
    shared: tuple[str, ...] = ()
    by_row: ClassVar[bool] = True  # the graph is traced for one row

    @property
    def ragged(self) -> tuple[str, ...]:
        """Return the names of the arguments whose rows may differ in size."""
        return self.arguments

    @property
    def known(self) -> bool:
        """Return True if the outputs are known."""
        return bool(self.outputs)

    def stacked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments with a tensor (N, ...) for each list. Raises TFMQError for rows of different sizes."""
        return {n: _stacked(n, x) if n in self.arguments else x for n, x in given.items()}

    def taken(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments as the `batched` network takes them. Raises TFMQError for rows of different sizes."""
        return self.stacked(given)

    def listed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call of the network, from those with tensors (N, ...)."""
        return {
            n: list(x.unbind()) if n in self.arguments and isinstance(x, Tensor) else x
            for n, x in given.items()
        }

    def in_lists(self, given: Mapping[str, Any]) -> bool:
        """Return True if a call has lists for its rows, not tensors."""
        return any(isinstance(given.get(n), (list, tuple)) for n in self.arguments)

    def by_shape(self, network: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Return what a network of tensors (N, ...) makes of lists: rows of equal shapes together, the others by themselves."""
        made = [self.outputs_of(network(**part), lambda x: list(x.unbind())) for part in self.parts(given)]
        output = made[0] if len(made) == 1 else _joined(made, self.groups(given))
        return self.outputs_of(output, torch.stack) if self._has_tensors(given) else output

    def _has_tensors(self, given: Mapping[str, Any]) -> bool:
        """Return True if a call has tensors (N, ...) for lists: then its outputs are tensors, too."""
        return any(isinstance(given.get(n), Tensor) for n in self.arguments)

    def parts(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return a call's arguments as those of calls with tensors (N, ...) for lists, one for each shape of rows."""
        groups, lists = self.groups(given), [n for n in self.arguments if given.get(n) is not None]
        rows = sum(map(len, groups))

        def of(chosen: list[int]) -> dict[str, Any]:
            of_rows = {n: x for n, x in given.items() if n not in self.shared}
            part = dict(given) | pytree.tree_map(lambda x: x[chosen] if has_rows(x, rows) else x, of_rows)
            return {**part, **{n: torch.stack([given[n][i] for i in chosen]) for n in lists}}

        return [of(chosen) if len(groups) > 1 else self.stacked(given) for chosen in groups]

    def groups(self, given: Mapping[str, Any]) -> list[list[int]]:
        """Return the numbers of the rows of each shape. Raises TFMQError for lists of different lengths."""
        lists = {n: given[n] for n in self.arguments if given.get(n) is not None}
        lengths = {n: len(x) for n, x in lists.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise TFMQError(f"forward: the lists of samples have different lengths: {lengths}.")
        found: dict[Any, list[int]] = {}
        for i, row in enumerate(zip(*lists.values(), strict=True)):
            found.setdefault(tuple(x.shape for x in row), []).append(i)
        return list(found.values())

    def outputs_of(self, output: Any, change: Callable[[Any], Any]) -> Any:
        """Return an output with its lists of rows changed."""
        if self.outputs == (_ITSELF,):
            return change(output)
        items = [change(x) if i in self.outputs else x for i, x in enumerate(_items(output))]
        if isinstance(output, Mapping):  # also diffusers' outputs, which are dataclasses too
            named = dict(zip(output, items, strict=True))  # by numbers, in a plain dict of layers
            return named if type(output) is dict else type(output)(**named)
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            names = [f.name for f in dataclasses.fields(output)]
            return dataclasses.replace(output, **dict(zip(names, items, strict=True)))
        return type(output)(items)

    def batched(self, network: nn.Module) -> nn.Module:
        """Return the same network, which takes tensors (N, ...) for its lists, too, and then returns tensors."""
        signature = signature_of(network)

        def forward(own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            stacks = self._has_tensors(given.arguments)
            given.arguments.update(self.listed(given.arguments))
            output = own(*given.args, **given.kwargs)
            return self.outputs_of(output, torch.stack) if stacks else output

        return known_as(with_forward(network, forward, signature), self)

    def alone(self, name: str) -> bool:
        """Return True if a single row of an argument is a list of one."""
        return name in self.arguments

    def first_row(
        self, network: nn.Module, example: Mapping[str, Any], rows: int, *, cut: Sequence[str] = ()
    ) -> nn.Module:
        """Return the same network, which takes tensors (N, ...), and computes the first row of its outputs alone.

        example: arguments in which tensors of `rows` rows have one for each. cut: lists of plain values, likewise.
        """
        signature = signature_of(network)
        of_row = pytree.tree_map(lambda x: has_rows(x, rows), dict(example))

        def forward(own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(*args, **kwargs)
            of_rows = [x for n, has in of_row.items() for x in _chosen(given.arguments[n], has)]
            if any(x.shape[0] != of_rows[0].shape[0] for x in of_rows):
                raise TFMQError(f"forward: {[x.shape[0] for x in of_rows]} rows.")
            for name, has in of_row.items():
                first = pytree.tree_map(lambda x, h: x[0] if h else x, given.arguments[name], has)
                given.arguments[name] = (
                    first[:1]
                    if name in cut
                    else [first]
                    if self.alone(name)
                    else pytree.tree_map(lambda x, h: x[None] if h else x, first, has)
                )
            output = self.outputs_of(own(*given.args, **given.kwargs), lambda x: x[0][None])
            return pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, output)

        return with_forward(network, forward, signature)

    @staticmethod
    def of_json(found: Mapping[str, Any]) -> RowLists:
        """Return what `to_json` gave."""
        return RowLists(tuple(found["arguments"]), tuple(found["outputs"]), tuple(found.get("shared", ())))

    def to_json(self) -> dict[str, Any]:
        """Return what an artefact keeps."""
        more = {"shared": list(self.shared)} if self.shared else {}
        return {"arguments": list(self.arguments), "outputs": list(self.outputs), **more}


class TensorRows(RowLists):
    """What of a network's arguments has rows in a way of its own, where no output is a list."""

    @property
    def known(self) -> bool:
        """Return True: no output is a list."""
        return True

    def outputs_of(self, output: Any, change: Callable[[Any], Any]) -> Any:  # noqa: ARG002
        """Return the output: it holds no lists."""
        return output


def is_list_of_rows(value: Any, rows: int) -> bool:
    """Return True for a list of `rows` tensors that have no batch of `rows` themselves."""
    return (
        isinstance(value, (list, tuple)) and rows > 0 and len(value) == rows and _is_list(value)
        and not all(has_rows(x, rows) for x in value)
    )  # fmt: skip


def known_as(view: nn.Module, lists: RowLists) -> nn.Module:
    """Return a `batched` network, of which the lists are known from here on."""
    vars(view)[_KNOWN] = lists
    return view


def known_row_lists(network: nn.Module) -> dict[str, Any] | None:
    """Return the row lists of a `batched` network, as an artefact keeps them; None for another one."""
    known = known_lists(network)
    return None if known is None else known.to_json()


def known_lists(network: nn.Module) -> RowLists | None:
    """Return the row lists of a `batched` network; None for another one."""
    known = vars(network).get(_KNOWN)
    return known if isinstance(known, RowLists) else None


_KNOWN = "known_row_lists"  # the attribute of `batched` networks that holds their lists


@torch.no_grad()
def row_lists(network: nn.Module, given: Mapping[str, Any], timestep: str) -> RowLists | None:
    """Return which arguments are lists with one entry for each row; None if none are.

    Of such a list, an entry more is a row more of the output, which depends on that entry, as the others do not.

    given: the arguments of a call.
    """
    if (known := known_lists(network)) is not None:
        return known
    t = given.get(timestep)
    names = [n for n, x in given.items() if _is_list(x) and x]
    count = t.shape[0] if isinstance(t, Tensor) and t.dim() else len(given[names[0]]) if names else 0
    names = [n for n in names if len(given[n]) == count]
    if not names:
        return None

    def cut(x: Any) -> Any:
        return x[:1] if has_rows(x, count) else x

    one = {n: list(x[:1]) if n in names else pytree.tree_map(cut, x) for n, x in given.items()}
    if "return_dict" in signature_of(network).parameters:
        one["return_dict"] = False
    try:
        alone = run(network, one)
        found = [_grown(alone, run(network, _with_another(one, names, changed=n)), names) for n in names]
    except Exception:  # the network's own, of any type
        return None
    return found[0] if all(x is not None and x == found[0] for x in found) else None


def _with_another(one: Mapping[str, Any], names: Sequence[str], *, changed: str) -> dict[str, Any]:
    """Return a call with a second row, which has another entry in one list."""

    def twice(x: Any) -> Any:
        return torch.cat([x, x]) if has_rows(x, 1) else x

    def other(x: Tensor) -> Tensor:
        return -x if x.is_floating_point() else x.flip(-1)

    lists = {n: [one[n][0], other(one[n][0]) if n == changed else one[n][0]] for n in names}
    return {n: pytree.tree_map(twice, x) for n, x in one.items()} | lists


def _grown(one: Any, two: Any, names: Sequence[str]) -> RowLists | None:
    """Return where the output of two rows has an entry more than that of one, if only the second differs."""
    if _is_list(one) and _is_list(two) and (len(one), len(two)) == (1, 2):
        places, pairs = [_ITSELF], [(one[0], *two)]
    else:
        a, b = _items(one), _items(two)
        rows = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)) if len(y) == 2 * len(x) == 2]
        places = [i for i, x, y in rows if _is_list(x) and _is_list(y)]
        pairs = [(x[0], *y) for _, x, y in rows]
    alike = bool(pairs) and all(x.shape == first.shape for x, first, _ in pairs)
    same = alike and all(only_other(*found) for found in pairs)
    return RowLists(tuple(names), tuple(places)) if same else None


def only_other(alone: Tensor, first: Tensor, second: Tensor) -> bool:
    """Return True if a row is the same beside another one, up to rounding, and the other differs by more than that."""
    rounding = (first - alone).norm()
    return bool(rounding <= NOISE * alone.norm() and (second - first).norm() > 2 * rounding)


def run(network: nn.Module, given: Mapping[str, Any]) -> Any:
    """Return what a network makes of a call's arguments, whose lists it may empty."""
    args, kwargs = call_of(network, pytree.tree_map(lambda x: x, dict(given)))
    return network(*args, **kwargs)


def _items(output: Any) -> list[Any]:
    """Return the items of a tuple, a dict or a dataclass; an output of another kind is one."""
    if isinstance(output, Mapping):
        return list(output.values())
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, f.name) for f in dataclasses.fields(output)]
    return list(output) if isinstance(output, (list, tuple)) else [output]


def _is_list(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and all(isinstance(e, Tensor) for e in x)


def has_rows(x: Any, rows: int) -> bool:
    """Return True for a tensor with so many rows, (rows, ...)."""
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == rows


def _chosen(value: Any, has: Any) -> Iterator[Tensor]:
    yield from (x for x, h in zip(pytree.tree_leaves(value), pytree.tree_leaves(has), strict=True) if h)


def _joined(outputs: Sequence[Any], groups: Sequence[Sequence[int]]) -> Any:
    """Return the outputs of groups of rows as one, in the order of the rows."""
    order = torch.tensor([i for chosen in groups for i in chosen]).argsort().tolist()

    def joined(*parts: Any) -> Any:
        if isinstance(parts[0], list):
            flat = [x for part in parts for x in part]
            return [flat[i] for i in order]
        return torch.cat(parts)[order] if isinstance(parts[0], Tensor) else parts[0]

    return pytree.tree_map(joined, *outputs, is_leaf=lambda x: isinstance(x, list))


def _stacked(name: str, rows: Any) -> Any:
    if not isinstance(rows, (list, tuple)):
        return rows
    if len(shapes := {tuple(x.shape) for x in rows}) > 1:
        raise TFMQError(
            f"{name}: its entries have different shapes, {' and '.join(map(str, sorted(shapes)))}."
        )
    return torch.stack([*rows])
