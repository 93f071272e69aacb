"""Let a graph that computes the first row of its inputs compute every row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError, first_line
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import aten, fake_mode_of, fixed_size, meta_value, op_name
from tfmq_fx.passes.pass_manager import declare

# What aten's schemas call the dimensions that an operator works on, and the sizes that it gives a tensor.
_DIMS = (
    "dim", "dims", "dim0", "dim1", "dim2", "start_dim", "end_dim", "source", "destination", "axis0", "axis1",
)  # fmt: skip
_SIZES = {"view": "size", "_unsafe_view": "size", "reshape": "shape", "expand": "size", "repeat": "repeats"}
_NEW = ("new_zeros", "new_ones", "new_full", "new_empty")
_JOINS = ("cat", "stack", "slice_scatter", "select_scatter")  # of tensors that must all have rows
_ADDS_A_DIM = ("unsqueeze", "stack", "diag_embed")  # their dimensions count those of the result
_OF_ALL = {
    aten.sum.default: aten.sum.dim_IntList,
    aten.mean.default: aten.mean.dim,
}  # -> the same over some dimensions
# Their first dimension is a batch, of which each entry is computed by itself.
_OWN_BATCH = (
    "conv",
    "group_norm",
    "batch_norm",
    "upsample",
    "avg_pool",
    "max_pool",
    "adaptive_",
    "_adaptive_",
    "reflection_pad",
    "replication_pad",
)


@declare(after=("inline_regions", "remove_noops"))
def batch_rows(gm: GraphModule) -> PassResult:
    """Compute all N rows of the inputs of which the graph takes the first alone. Each row as before, up to rounding.

        x_0 = select(x, 0, 0)                               (C, H, W)
        y = conv2d(unsqueeze(x_0, 0), w)         ==>        y = conv2d(x, w)       (N, C, H, W)
        output: select(y, 0, 0)                             output: y

    This is torch.vmap for graphs, but operators stay the ones they are: vmap would decompose linear layers and attention.
    A batch of one in the graph becomes the batch of N; elsewhere the rows are a new first dimension.

    Raises TFMQError, with the node's name, for an operator that cannot be computed for all rows at once.
    """
    firsts = [n for n in gm.graph.find_nodes(op="call_function", target=aten.select.int) if _is_first_row(n)]
    if not firsts:
        return PassResult(gm, False)
    rows = _Rows(gm, firsts)
    for node in list(gm.graph.nodes):
        if node in firsts:
            rows.put(node, node.args[0], flat=False)
        elif node.op == "call_function" and rows.known(node.all_input_nodes):
            rows.compute(node)
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = map_arg(output.args, lambda n: rows.full(n) if n in rows else n)
    for node in reversed(list(gm.graph.nodes)):
        if node in rows:  # some operators would count as impure
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


def _is_first_row(node: Node) -> bool:
    x, dim, index = node.args
    return isinstance(x, Node) and x.op == "placeholder" and (dim, index) == (0, 0)


class _Rows:
    """The values of a graph's nodes for all rows, by the node that computes the value of one.

    Of a value (1, ...) there may be two: (N, 1, ...), which is its full one, and (N, ...), its flat one.
    """

    def __init__(self, gm: GraphModule, firsts: Sequence[Node]) -> None:
        self.graph = gm.graph
        self.mode = fake_mode_of(gm.graph.nodes)
        self._full: dict[Node, Node] = {}
        self._flat: dict[Node, Node] = {}
        self._lists: dict[Node, tuple[Node, bool]] = {}  # of tensors: the node, and if it has flat values
        source = firsts[0].args[0]
        with gm.graph.inserting_after(list(placeholders(gm).values())[-1]):
            self.count = self._call(aten.sym_size.int, (source, 0))

    def __contains__(self, node: Node) -> bool:
        return node in self._full or node in self._flat or node in self._lists

    def known(self, nodes: Iterable[Node]) -> list[Node]:
        return [n for n in nodes if n in self]

    def put(self, node: Node, value: Any, *, flat: bool) -> None:
        """Note the value of a node for all rows. flat: whether it is the flat one."""
        (self._flat if flat else self._full)[node] = value

    def full(self, node: Node) -> Node:
        if node not in self._full:
            self._full[node] = self._call(aten.unsqueeze.default, (self._flat[node], 1))
        return self._full[node]

    def flat(self, node: Node) -> Node:
        if node not in self._flat:
            self._flat[node] = self._call(aten.squeeze.dim, (self._full[node], 1))
        return self._flat[node]

    def compute(self, node: Node) -> None:
        """Compute a node for all rows: with the same arguments on flat values, else on full ones."""
        with self.graph.inserting_before(node):
            if node.target is aten.sym_size.int:
                self._measure(node)
            elif op_name(node) in _NEW:  # reads the dtype and the device alone
                (x,) = node.all_input_nodes[:1]
                node.replace_input_with(x, self.full(x))
            elif node.target is operator.getitem:
                self._get(node)
            elif not self._moved(node):
                self._compute(node)

    def _compute(self, node: Node) -> None:
        name = op_name(node)
        other = self._transposed if name in ("t", "numpy_T", "mT") else self._with_rows
        other = {"index": self._index, "index_put": self._index_put}.get(name, other)
        other = self._over_all if node.target in _OF_ALL else other
        edges = name == "pad" and _bound(node)["mode"] != "constant"  # by values, which needs a batch
        way = self._own_batch if edges or name.startswith(_OWN_BATCH) else other
        if self._tried(self._as_is, node) is not None and (why := self._tried(way, node)) is not None:
            raise TFMQError(
                f"node {node.name}: {node.target} cannot be computed for all samples of a list at once ({why}); give the "
                "network tensors with a batch."
            )

    def _measure(self, node: Node) -> None:
        """Let a query read a size of all rows' value."""
        x, dim = node.args
        assert isinstance(x, Node)
        assert isinstance(dim, int)
        rank = meta_value(x).dim()
        node.args = (self.full(x), dim % rank + 1)

    def _get(self, node: Node) -> None:
        (values, index) = node.args
        assert isinstance(values, Node)
        made, flat = self._lists[values]
        self.put(node, self._call(operator.getitem, (made, index)), flat=flat)

    def _moved(self, node: Node) -> bool:
        """Put what only makes a batch of one, or takes the row out of it: then all rows are the batch."""
        name = op_name(node)
        x, *rest = node.args
        alone = isinstance(x, (list, tuple)) and len(x) == 1  # of a list of one sample's tensor
        x = x[0] if alone else x  # type: ignore[index]
        if not isinstance(x, Node) or x not in self or x in self._lists:
            return False
        if alone and name == "cat":
            self.put(node, self.full(x), flat=False)
        elif (
            (alone and name == "stack" and rest in ([], [0]))
            or (alone and name == "pad_sequence" and rest[:1] == [True])
            or (name == "unsqueeze" and rest[0] in (0, -1 - meta_value(x).dim()))
        ):
            self.put(node, self.full(x), flat=True)
        elif _is_one(x) and ((name == "select" and rest == [0, 0]) or (name == "squeeze" and rest == [0])):
            self.put(node, self.flat(x), flat=False)
        else:
            return False
        return True

    def _tried(self, way: Callable[[Node], None], node: Node) -> str | None:
        """Compute a node in this way. Return why that is not its value for all rows, None if it is."""
        try:
            way(node)
        except _NoWayError as error:
            return str(error)
        except Exception as error:  # operators raise many types for shapes that do not fit
            return first_line(error)
        return None

    def _as_is(self, node: Node) -> None:
        """Call the operator on flat values: the batch of one, which it leaves alone, is one of N."""
        given, name = _bound(node), op_name(node)
        if not all(map(_is_one, [node, *self.known(node.all_input_nodes)])):
            raise _NoWayError("it has no batch of one")
        moved = (
            _dims(node, given, "dims")[0] != 0
            if name == "permute"
            else any(0 in _dims(node, given, n) for n in _DIMS)
        )
        if moved or (name == "index_put" and given["indices"][0] is not None):
            raise _NoWayError("it works on the batch")
        sizes = _SIZES.get(name)
        if sizes is not None and name != "repeat" and given[sizes][0] != -1:
            given[sizes] = [self.count, *given[sizes][1:]]
        self._made(node, self._mapped(given, self.flat), flat=True)

    def _with_rows(self, node: Node) -> None:
        """Call the operator on full values, with the rows as a new first dimension."""
        name, given = op_name(node), _bound(node)
        ranks = [meta_value(n).dim() for n in node.all_input_nodes if isinstance(meta_value(n), Tensor)]
        rank = max(ranks) if _is_pointwise(node) else ranks[0]
        if sizes := _SIZES.get(name):
            rank = len(given[sizes]) if name in ("expand", "repeat") else rank
            given[sizes] = [1 if name == "repeat" else self.count, *given[sizes]]
        for argument in [n for n in _DIMS if n in given]:
            dims = [*[0] * (name == "permute"), *(d + 1 for d in _dims(node, given, argument))]
            one = isinstance(given[argument], int)
            given[argument] = dims[0] if one else dims or list(range(1, rank + 1))  # none stand for all
        aligned = name in ("expand", "repeat") or _is_pointwise(node)
        of = (lambda n: self._aligned(n, rank)) if aligned else self.full
        self._made(node, self._mapped(given, of, repeats=name in _JOINS), flat=False)

    def _own_batch(self, node: Node) -> None:
        """Call the operator on one batch of all rows' own batches, or on the rows as a batch if they have none."""
        given = _bound(node)
        x, *others = self.known(node.all_input_nodes)
        if others or next(iter(given.values())) is not x:
            raise _NoWayError("its weights differ from row to row")
        if op_name(node).startswith("conv") and meta_value(x).dim() < meta_value(given["weight"]).dim():
            self._made(node, self._mapped(given, self.full), flat=False)
            return
        folded = self._call(aten.flatten.using_ints, (self.full(x), 0, 1))
        made = self._call(node.target, self._mapped(given, lambda _: folded))
        size = self._call(aten.sym_size.int, (self.full(x), 1))
        self._made(node, (made, 0, [self.count, size]), flat=False, target=aten.unflatten.int)

    def _transposed(self, node: Node) -> None:
        (x,) = node.all_input_nodes
        self._made(node, (self.full(x), -2, -1), flat=False, target=aten.transpose.int)

    def _over_all(self, node: Node) -> None:
        (x, *_), named = node.args, node.kwargs
        assert isinstance(x, Node)
        dims = list(range(1, meta_value(x).dim() + 1))
        args = (self.full(x), dims, False, named.get("dtype"))
        target = next(over for whole, over in _OF_ALL.items() if whole is node.target)
        self._made(node, args, flat=False, target=target)

    def _index(self, node: Node) -> None:
        """Index the rows by what is the same for all of them, or by each row's own indices."""
        given = _bound(node)
        x, indices = given["self"], given["indices"]
        rank = max(meta_value(i).dim() for i in indices if i is not None)
        own = [self._aligned(i, rank) if i in self else i for i in indices]
        if x not in self and indices[0] is None:
            raise _NoWayError("it is indexed by the row after a whole dimension")
        if x in self and own == [*indices]:
            own = [None, *own]
        elif x in self:
            number = self._call(aten.arange.default, (self.count,), {"device": meta_value(x).device})
            own = [self._call(aten.view.default, (number, [-1, *[1] * rank])), *own]
        self._made(node, (self.full(x) if x in self else x, own), flat=False)

    def _index_put(self, node: Node) -> None:
        """Write to the same places of each row, or one value to where each row's mask is true."""
        given = _bound(node)
        x, indices, values = given["self"], given["indices"], given["values"]
        if len(indices) == 1 and indices[0] in self and self._masked(node, x, indices[0], values):
            return
        at = [n for n, i in enumerate(indices) if i is not None]
        if any(indices[n] in self for n in at):
            raise _NoWayError("it writes to other places in each row")
        if at != list(range(at[0], at[-1] + 1)):
            raise _NoWayError("it writes to places of dimensions that are not side by side")
        of_index = [meta_value(indices[n]) for n in at]
        masked = [i.dim() if i.dtype == torch.bool else 0 for i in of_index]
        rank = meta_value(x).dim() - sum(m or 1 for m in masked)
        rank += max(1 if m else i.dim() for m, i in zip(masked, of_index, strict=True))
        written = self._aligned(values, rank) if values in self else values
        rows = self._mapped({"self": x}, self.full, repeats=True)
        self._made(node, (*rows, [None, *indices], written, given["accumulate"]), flat=False)

    def _masked(self, node: Node, x: Node, mask: Node, values: Node) -> bool:
        """Put the value that is written where a mask is true by a choice between it and what was there; False if that is not all."""
        rank, rest = meta_value(x).dim(), meta_value(x).dim() - meta_value(mask).dim()
        if (
            meta_value(mask).dtype != torch.bool
            or meta_value(values).dim() > rest
            or _bound(node)["accumulate"]
        ):
            return False
        chosen = self.full(mask)
        for _ in range(rest):
            chosen = self._call(aten.unsqueeze.default, (chosen, -1))
        written = self._aligned(values, rank) if values in self else values
        old = self.full(x) if x in self else x
        self._made(node, (chosen, written, old), flat=False, target=aten.where.self)
        return True

    def _aligned(self, node: Node, rank: int) -> Node:
        """Return a full value (N, 1, .., ...) whose rows have `rank` dimensions, as broadcasting would add them."""
        value = self.full(node)
        for _ in range(rank - meta_value(node).dim()):
            value = self._call(aten.unsqueeze.default, (value, 1))
        return value

    def _mapped(
        self, given: dict[str, Any], of: Callable[[Node], Node], *, repeats: bool = False
    ) -> tuple[Any, ...]:
        """Return arguments with all rows' values. repeats: tensors that are the same for all rows are repeated."""

        def mapped(n: Node) -> Any:
            value = meta_value(n)
            if n in self:
                return of(n)
            if not repeats or not isinstance(value, Tensor):
                return n
            return self._call(aten.expand.default, (n, [self.count, *[-1] * value.dim()]))

        return tuple(map_arg(tuple(given.values()), mapped))

    def _made(self, node: Node, args: tuple[Any, ...], *, flat: bool, target: Any = None) -> None:
        """Put a call as the value of a node. Raises _NoWayError if it has not a row for each, of the node's shape."""
        target = target or node.target
        try:
            value = self._value(target, args)
        except (RuntimeError, ValueError):
            if target is not aten.view.default:
                raise
            # All rows may lie otherwise in memory than the first did alone: attention has several kernels.
            target = aten.reshape.default
            value = self._value(target, args)
        for made, row in zip(_tensors(value), _tensors(meta_value(node)), strict=True):
            expected = [_hint(self.count.meta["val"]), *map(_hint, row.shape[1:] if flat else row.shape)]
            if [*map(_hint, made.shape)] != expected:
                raise _NoWayError(f"it would have shape {tuple(made.shape)}")
        new = self._call(target, args, value=value)
        if isinstance(value, Tensor):
            self.put(node, new, flat=flat)
        else:
            self._lists[node] = new, flat

    def _value(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        assert self.mode is not None
        taken, named = map_arg((args, kwargs or {}), meta_value)
        with torch.no_grad(), self.mode, enable_python_dispatcher():
            return _called(target, taken, named)

    def _call(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, value: Any = None
    ) -> Node:
        value = self._value(target, args, kwargs) if value is None else value
        positional, named = _split(target, args)
        new = self.graph.call_function(target, positional, {**named, **(kwargs or {})})
        new.meta["val"] = value
        return new


class _NoWayError(Exception):
    """An operator cannot be computed in some way; the message says why."""


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)  # type: ignore[arg-type]


def _is_one(node: Node) -> bool:
    """Return True for a tensor (1, ...), or a list of such tensors."""
    value = meta_value(node)
    return isinstance(value, (Tensor, list, tuple)) and all(
        isinstance(x, Tensor) and x.dim() and fixed_size(x.shape[0]) == 1 for x in _tensors(value)
    )


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _bound(node: Node) -> dict[str, Any]:
    """Return all arguments of an operator by name, defaults included, in the order of its schema."""
    if not isinstance(node.target, OpOverload):
        raise _NoWayError("it is no operator of torch's")
    names = [a.name for a in node.target._schema.arguments]
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def _split(target: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return an operator's arguments as it takes them, without defaults at the end."""
    if not isinstance(target, OpOverload):
        return args, {}
    specs = target._schema.arguments[: len(args)]
    named = {a.name: x for a, x in zip(specs, args, strict=True) if a.kwarg_only and x is not a.default_value}
    positional = [(x, a) for a, x in zip(specs, args, strict=True) if not a.kwarg_only]
    while (
        positional
        and positional[-1][1].has_default_value()
        and positional[-1][0] == positional[-1][1].default_value
    ):
        positional.pop()
    return tuple(x for x, _ in positional), named


def _called(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    positional, named = _split(target, args)
    return target(*positional, **named, **kwargs)


def _dims(node: Node, given: dict[str, Any], name: str) -> list[int]:
    """Return the dimensions that an argument names, counted from the first."""
    value = given.get(name)
    if value is None:
        return []
    first = next(n for n in node.all_input_nodes if isinstance(meta_value(n), Tensor))
    rank = meta_value(first).dim() + (op_name(node) in _ADDS_A_DIM)
    return [d % max(rank, 1) for d in (value if isinstance(value, (list, tuple)) else [value])]
