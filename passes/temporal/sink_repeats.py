"""Let the layers of the temporal block compute each sample's row once, where a network repeats it for its frames or tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.fakes import fill_fake_values
from tfmq_fx.graph.inputs import conditioning_vectors, timestep_input
from tfmq_fx.graph.nodes import aten, count, is_by_row, meta_value, meta_without_value, op_name
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.temporal.find_temporal import overwritten, taint

_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "slice"}
_ELEMENTWISE = {"to", "_to_copy", "clone", "contiguous", "detach", "alias", "dropout"}  # beside the pointwise


@dataclass(frozen=True)
class _Repeats:
    """How a node holds the rows (N, ...) of another: (N * times, ...) if they are merged, else (N, times, ...)."""

    times: int | Node
    merged: bool

    def columns(self, x: Tensor) -> int:
        """Return how many dimensions of such a node's tensor are not those of the rows."""
        return x.dim() - (1 if self.merged else 2)


@declare(after=("bind_parameters", "root_batch_size", "linear_matmuls", "fold_parameters"))
def sink_repeats(gm: GraphModule, *, timestep: str | None = None) -> PassResult:
    """Repeat the rows of the temporal block behind its layers, instead of before them.

        linear(silu(repeat_interleave(h, frames, 0)), W, b)   ==>   repeat_interleave(linear(silu(h), W, b), frames, 0)

    A network for videos repeats the embedding of its timestep for each frame. The rows of its features are then not the
    samples, and their number moves with the video, so that no table could hold them. Repeats as rows (N * frames, C) and as
    a dimension (N, frames, C) sink through pointwise operators, reshapes from one to the other, and layers. They stay where no
    layer follows, where a layer's input also depends on something else, and in a graph without shapes.

    timestep: the input's name, see `timestep_input`.

    Numerics: within a few roundings, as a product with fewer rows may be summed in another order.
    """
    source = timestep_input(gm, timestep)
    allowed = {str(source.target), *conditioning_vectors(gm, str(source.target))}
    marks = taint(gm)
    inside = [n for n in gm.graph.nodes if n.op == "call_function" and marks[n] and marks[n] <= allowed]
    sinking = _Sinking(gm)
    for node in inside:
        sinking.visit(node)
    if sinking.changed:
        gm.graph.eliminate_dead_code()
        fill_fake_values(gm)
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, sinking.changed)


class _Sinking:
    """One walk through a temporal block in topological order."""

    def __init__(self, gm: GraphModule) -> None:
        self.graph = gm.graph
        self.written = overwritten(gm, set(gm.graph.nodes))
        self.found: dict[Node, _Repeats] = {}
        # A node of `found` -> the node with the rows that it repeats, once a layer needs them.
        self.cores: dict[Node, Node] = {}
        self.changed = False

    def visit(self, node: Node) -> None:
        if self.written & {node, *node.all_input_nodes}:
            return
        repeats = _repeats(node) or self._behind(node)
        if repeats is None:
            return
        self.found[node] = repeats
        if is_by_row(node):
            self._sink(node)

    def _behind(self, node: Node) -> _Repeats | None:
        """Return how a node repeats rows that it computes of those that its inputs repeat; None if it does not."""
        value, name = meta_value(node), op_name(node)
        given = [n for n in node.all_input_nodes if n in self.found]
        if not given or not isinstance(value, Tensor) or len({self.found[n] for n in given}) > 1:
            return None
        first, repeats = meta_value(given[0]), self.found[given[0]]
        if name in _RESHAPES:
            return _reshaped(repeats, first, value) if given == [node.args[0]] else None
        if is_by_row(node):
            return repeats if given == [node.args[0]] else None
        if name not in _ELEMENTWISE and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return None
        others = [meta_value(n) for n in node.all_input_nodes if n not in self.found]
        alike = all(isinstance(x, Tensor) and x.dim() <= repeats.columns(first) for x in others)
        return repeats if alike and _sizes(value) == _sizes(first) else None

    def _sink(self, layer: Node) -> None:
        """Let a layer compute the rows, and repeat what it returns."""
        repeats, value = self.found.pop(layer), meta_value(layer)
        for n in layer.all_input_nodes:
            if n in self.found:
                layer.replace_input_with(n, self._core(n))
        with self.graph.inserting_after(layer):
            call = self.graph.call_function
            rows = call(aten.unsqueeze.default, (layer, 1))
        with self.graph.inserting_after(rows):
            sizes = [-1, repeats.times, *[-1] * repeats.columns(value)]
            result = call(aten.expand.default, (rows, sizes))
        if repeats.merged:
            with self.graph.inserting_after(result):
                result = call(aten.flatten.using_ints, (result, 0, 1))
        result.meta = dict(layer.meta)
        layer.meta = meta_without_value(layer)
        layer.replace_all_uses_with(result, delete_user_cb=lambda user: user is not rows)
        self.found[result], self.cores[result] = repeats, layer
        self.changed = True

    def _core(self, node: Node) -> Node:
        """Return the node that computes the rows which this one repeats."""
        if node not in self.cores:
            self.cores[node] = self._made(node)
        return self.cores[node]

    def _made(self, node: Node) -> Node:
        x = node.args[0]
        assert isinstance(x, Node)
        if _repeats(node) is not None:
            if op_name(node) == "repeat_interleave":
                return x
            if x.target is aten.unsqueeze.default and x.args[1] == 1:
                return x.args[0]  # type: ignore[return-value]
            with self.graph.inserting_before(node):
                return self.graph.call_function(aten.select.int, (x, 1, 0))
        if op_name(node) in _RESHAPES:
            return self._core(x)
        with self.graph.inserting_before(node):
            made = self.graph.node_copy(node, lambda n: self._core(n) if n in self.found else n)
        made.meta = meta_without_value(node)
        return made


def _repeats(node: Node) -> _Repeats | None:
    """Return how a node itself repeats rows; None if it does not."""
    x = node.args[0] if node.args else None
    before, after = (meta_value(n) if isinstance(n, Node) else None for n in (x, node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if node.target is aten.repeat_interleave.self_int and before.dim() > 1:
        by_row = len(node.args) == 3 and node.args[2] == 0
        return _Repeats(node.args[1], merged=True) if by_row else None  # type: ignore[arg-type]
    if node.target not in (aten.expand.default, aten.repeat.default):
        return None
    was, now = _sizes(before), _sizes(after)
    if len(was) < 3 or was[1] != 1 or now[1] == 1 or [was[0], *was[2:]] != [now[0], *now[2:]]:
        return None
    return _Repeats(node.args[1][1], merged=False)  # type: ignore[index,arg-type]


def _reshaped(repeats: _Repeats, before: Tensor, after: Tensor) -> _Repeats | None:
    """Return how the same rows are repeated in another shape; None if it does not show."""
    was, now, often = _sizes(before), _sizes(after), repeats.times
    times = count([meta_value(often) if isinstance(often, Node) else often])
    if was == now:
        return repeats
    if repeats.merged and now[1:] == [times, *was[1:]] and now[0] * times == was[0]:
        return replace(repeats, merged=False)
    if not repeats.merged and now == [was[0] * times, *was[2:]]:
        return replace(repeats, merged=True)
    return None


def _sizes(x: Tensor) -> list[Any]:
    return [count([d]) for d in x.shape]
