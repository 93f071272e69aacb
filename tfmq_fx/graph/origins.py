"""Find where the channels of a layer's input come from.

The dataflow is not described operator by operator. Instead, the elements of a producer's output are numbered
and the graph's own views run on the numbers. The numbers that arrive at a layer say where each of its
channels comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from tfmq_fx.graph.channels import ParameterLayer, count_readers, layer_of, set_tensor
from tfmq_fx.graph.nodes import (
    MOVES,
    attribute,
    meta_value,
    mutated_inputs,
    op_name,
    output_channel_axis,
    value_inputs,
    weight_argument,
)

_SAME = {"dropout", "to", "_to_copy", "mul", "div", "neg"}  # the last three: by a number
_POSITIVE = {"relu", "leaky_relu"}  # f(s x) = s f(x) for s > 0
_NORMS = {"group_norm": (2, 3), "layer_norm": (2, 3), "rms_norm": (2, None), "batch_norm": (1, 2)}
_MIXES = {"scaled_dot_product_attention": 2, "matmul": 1, "bmm": 1}  # sums over positions of this argument


@dataclass(frozen=True, kw_only=True)
class Producer:
    """A layer, or the affine part of a norm, whose output channels can be rewritten offline."""

    node: Node
    paths: tuple[str, ...]  # its weight and, if it has one, its bias
    start: int  # the number of its first channel
    channels: int
    axis: int  # the channel dimension of its output, from the end
    weight_axis: int  # the channel dimension of its weight

    def rewrite(self, gm: GraphModule, change: Callable[[Tensor], Tensor], *, mapped: bool) -> None:
        """Apply `change` to the weight's and the bias's rows (channels, ...), in float64. mapped: see `set_tensor`."""
        for path in self.paths:
            old = attribute(gm, path).detach()
            axis = self.weight_axis if old.dim() > 1 else 0
            rows = old.double().movedim(axis, 0)
            new = change(rows.flatten(1) if rows.dim() > 1 else rows[:, None])
            set_tensor(gm, path, new.reshape(rows.shape).movedim(0, axis), mapped=mapped)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The producers of the input channels of some layers. Invariant: nothing else reads these channels."""

    producers: tuple[Producer, ...]
    # Layer -> the numbers (C_in,) of its input's channels, counted over the producers.
    read: Mapping[Node, Tensor]

    @property
    def words(self) -> str:
        """Return where a change was folded, for `Change.reason`."""
        return f"into {', '.join(p.paths[0] for p in self.producers)}"


@dataclass(frozen=True, kw_only=True)
class Explicit:
    """Layers with a common input that only new nodes of the graph can change."""

    x: Node
    axis: int  # the channel dimension, from the end
    layers: tuple[ParameterLayer, ...]
    reason: str  # why it cannot be done offline


def find_origins(
    gm: GraphModule, layers: Iterable[ParameterLayer], *, temporal: Iterable[str], block: int | None = None
) -> tuple[list[Origin], list[Explicit]]:
    """Return, for every layer, where its input's channels can be changed offline, or why they cannot.

    Each layer is in exactly one of the two lists. The graph is only read. temporal: names of the temporal
    block's nodes; block: see `Tracer`.
    """
    by_input: dict[tuple[Node, int], list[ParameterLayer]] = {}
    for layer in layers:
        by_input.setdefault((layer.x, layer.axis), []).append(layer)
    tracer = Tracer(gm, layers, temporal=temporal, block=block)
    found = {key: tracer.origin(key[0]) for key in by_input}
    origins: list[Origin] = []
    taken: set[Node] = set()
    for origin in found.values():
        if isinstance(origin, Origin) and not taken & origin.read.keys():
            origins.append(origin)
            taken |= origin.read.keys()
    explicit = []
    for (x, axis), readers in by_input.items():
        left = tuple(layer for layer in readers if layer.node not in taken)
        if left:
            reason = found[x, axis]
            explicit.append(Explicit(x=x, axis=axis, layers=left, reason=str(reason)))
    return origins, explicit


class Tracer:
    """A search for the origins of layers' inputs in one graph.

    block: None for changes of scale, which pass through positively homogeneous operators. A number for mixing
        each `block` consecutive channels, which passes through linear operators that treat these channels
        alike.
    """

    def __init__(
        self,
        gm: GraphModule,
        layers: Iterable[ParameterLayer],
        *,
        temporal: Iterable[str],
        block: int | None = None,
    ) -> None:
        self.gm, self.block = gm, block
        self.layers = {layer.node: layer for layer in layers}
        self.inside = set(temporal)
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.readers = count_readers(gm)
        self._next = 0  # positions are numbered across the whole trace

    def origin(self, x: Node) -> Origin | str:
        """Return the origin of node x's channels, or the reason why there is none."""
        found = self._producers(x)
        if isinstance(found, str):
            return found
        producers, start = [], 0
        for node in sorted(set(found), key=self.order.__getitem__):
            producers.append(self._producer(node, start))
            start += producers[-1].channels
        return self._forward(x, producers)

    # ---- backwards: from a layer's input to what produces it

    def _producers(self, node: Node) -> list[Node] | str:
        if self._is_producer(node):
            return [node]
        if not self._passes(node):
            return f"{op_name(node) or node.op} ({node.name}) in between"
        carried = self._carried(node)
        if op_name(node) == "mul":  # by another tensor: either factor may take the scale
            reasons = [self._producers(n) for n in carried]
            return next((r for r in reasons if not isinstance(r, str)), reasons[0])
        found: list[Node] = []
        for source in carried:
            more = self._producers(source)
            if isinstance(more, str):
                return more
            found += more
        return found

    def _is_producer(self, node: Node) -> bool:
        if node.name in self.inside or not isinstance(meta_value(node), Tensor):
            return False
        if weight_argument(node) is not None:
            layer = layer_of(self.gm, node, self.readers)
            alone = layer is not None and (layer.groups == 1 or not layer.transposed)
            return alone and self._bias(node, 2) is not None
        if self.block is not None or op_name(node) not in _NORMS:
            return False
        weight, bias = _NORMS[op_name(node)]
        one_axis = "group" in op_name(node) or "batch" in op_name(node) or len(node.args[1]) == 1  # type: ignore[arg-type]
        return (
            one_axis
            and bool(self._bias(node, weight))
            and (bias is None or self._bias(node, bias) is not None)
        )

    def _bias(self, node: Node, index: int) -> str | None:
        """Return the path of a parameter that only this node reads; "" for none; None for anything else."""
        value = node.args[index] if len(node.args) > index else None
        if value is None:
            return None if any(isinstance(v, Node) for v in node.kwargs.values()) else ""
        own = isinstance(value, Node) and value.op == "get_attr" and self.readers[str(value.target)] == 1
        return str(value.target) if own else None  # type: ignore[union-attr]

    def _producer(self, node: Node, start: int) -> Producer:
        layer = layer_of(self.gm, node, self.readers)
        if layer is not None:
            axis, weight_axis = layer.axis, output_channel_axis(node)
            indices: tuple[int | None, ...] = (1, 2)
        else:
            norm = op_name(node)
            axis = -1 if norm in ("layer_norm", "rms_norm") else 1 - meta_value(node).dim()
            weight_axis, indices = 0, _NORMS[norm]
        paths = tuple(p for i in indices if i is not None and (p := self._bias(node, i)))
        return Producer(
            node=node,
            paths=paths,
            start=start,
            channels=int(meta_value(node).shape[axis]),
            axis=axis,
            weight_axis=weight_axis,
        )

    def _passes(self, node: Node) -> bool:
        name = op_name(node)
        if node.op != "call_function" or node.name in self.inside or mutated_inputs(node):
            return False
        value = meta_value(node)
        if not isinstance(value, (list, tuple)) and not (
            isinstance(value, Tensor) and value.is_floating_point()
        ):
            return False
        if name in _MIXES:  # a value that is also its own query or key would be changed twice
            return node.args.count(node.args[_MIXES[name]]) == 1
        if name in MOVES:
            return True
        if name in ("mul", "div", "neg"):
            factors = [a for a in node.args if isinstance(a, Node)]
            by_tensor = name == "mul" and self.block is None and len(set(factors)) == 2
            return not node.kwargs and (len(factors) == 1 or by_tensor)
        return name in _SAME or (name in _POSITIVE and self.block is None)

    def _carried(self, node: Node) -> list[Node]:
        """Return the inputs whose channels are this node's."""
        if op_name(node) in _MIXES:
            value = node.args[_MIXES[op_name(node)]]
            return [value] if isinstance(value, Node) else []
        return [n for n in value_inputs(node) if isinstance(meta_value(n), (Tensor, list, tuple))]

    # ---- forwards: from the producers to everything that reads their channels

    def _forward(self, x: Node, producers: list[Producer]) -> Origin | str:
        sources = [p.node for p in producers]
        flow = _Channels({p.node: self._numbered(p) for p in producers})
        region = self._region(sources)
        for node in sorted(region, key=self.order.__getitem__):
            self._follow(node, flow)
        read = self._read([*dict.fromkeys(sources), *region], region, flow)
        wanted = [v for user, v in read.items() if self.layers[user].x is x]
        if not wanted:
            return "its channels do not line up with those of what produces them"
        taking, group = _sharing(read, set(wanted[0].tolist()))
        if -1 in group:
            return "some of its channels come from elsewhere"
        if hit := group & flow.leaks.keys():
            return flow.leaks[min(hit)]
        if self.block is not None and (reason := self._misaligned(taking.values(), producers)):
            return reason
        return Origin(producers=tuple(producers), read=taking)

    def _region(self, sources: list[Node]) -> set[Node]:
        """Return the nodes that the sources' channels pass through."""
        region: set[Node] = set()
        stack = list(sources)
        while stack:
            for user in stack.pop().users:
                if user not in region and user not in sources and self._passes(user):
                    region.add(user)
                    stack.append(user)
        return region

    def _follow(self, node: Node, flow: _Channels) -> None:
        """Number the channels of a node's output by those of its inputs; what cannot be followed leaks."""
        carried = [n for n in self._carried(node) if n in flow.numbers]
        for other in node.all_input_nodes:
            if other not in carried:
                flow.leak(other, node)
        result = self._run(node, carried, flow.numbers) if carried else None
        if result is not None:
            flow.numbers[node] = result
            return
        for other in carried:
            flow.leak(other, node)

    def _read(self, nodes: Iterable[Node], region: set[Node], flow: _Channels) -> dict[Node, Tensor]:
        """Return the channel numbers that layers read; every other reader outside the region leaks."""
        read: dict[Node, Tensor] = {}
        for node in nodes:
            for user in node.users if node in flow.numbers else ():
                if user in region:
                    continue
                layer = self.layers.get(user)
                reads_it = layer is not None and layer.x is node and user.all_input_nodes.count(node) == 1
                vector = self._vector(layer, *flow.numbers[node]) if layer is not None and reads_it else None
                if vector is None:
                    flow.leak(node, user)
                else:
                    read[user] = vector
        return read

    def _numbered(self, p: Producer) -> tuple[Any, Any]:
        shape = _shape(meta_value(p.node))
        channel = torch.arange(p.start, p.start + p.channels).view([-1] + [1] * (-p.axis - 1)).expand(shape)
        positions = list(shape)
        positions[p.axis] = 1
        return channel, self._positions(positions).expand(shape)

    def _positions(self, shape: list[int]) -> Tensor:
        count = int(torch.Size(shape).numel())
        self._next += count
        return torch.arange(self._next - count, self._next).view(shape)

    def _run(
        self, node: Node, carried: list[Node], numbers: Mapping[Node, tuple[Any, Any]]
    ) -> tuple[Any, Any] | None:
        """Return the channel and position numbers of a node's elements, or None if they are unknown."""
        name = op_name(node)
        if name in _MIXES:
            (value,) = carried
            channel, position = numbers[value]
            shape = _shape(meta_value(node))
            same = bool((channel == channel[..., :1, :]).all() and (position == position[..., :1]).all())
            if not same or channel.dim() != len(shape) or list(channel.shape[:-2]) != shape[:-2]:
                return None
            return channel[..., :1, :].expand(shape), self._positions([*shape[:-1], 1]).expand(shape)
        if name in ("mul", "div", "neg", *_POSITIVE, *_SAME):
            if len(carried) != 1:
                return None
            shape = _shape(meta_value(node))
            channel, position = numbers[carried[0]]
            return channel.expand(shape), position.expand(shape)
        assert callable(node.target)
        try:
            return tuple(
                node.target(*map_arg(node.args, arg), **map_arg(node.kwargs, arg))  # type: ignore[return-value]
                for arg in (lambda n, i=i: _argument(n, numbers, i) for i in (0, 1))
            )
        except (RuntimeError, IndexError, TypeError):  # a view needs a size that capture did not fix
            return None

    def _vector(self, layer: ParameterLayer, channel: Any, position: Any) -> Tensor | None:
        """Return the channel numbers (C_in,) of a layer's input, or None if they differ between positions."""
        if not isinstance(channel, Tensor) or channel.dim() < -layer.axis:
            return None
        channel_CP = channel.movedim(layer.axis, 0).flatten(1)
        if not (channel_CP == channel_CP[:, :1]).all():
            return None
        if self.block is not None:
            if len(channel_CP) % self.block or (
                layer.groups > 1 and len(channel_CP) // layer.groups % self.block
            ):
                return None
            position_BbP = position.movedim(layer.axis, 0).flatten(1).unflatten(0, (-1, self.block))
            if not (position_BbP == position_BbP[:, :1]).all():
                return None
        return channel_CP[:, 0].clone()

    def _misaligned(self, vectors: Iterable[Tensor], producers: list[Producer]) -> str:
        """Return why the blocks of these layers' channels are not blocks of a producer's; "" if they are."""
        assert self.block is not None
        block_of: dict[int, tuple[int, ...]] = {}
        for vector in vectors:
            for block in map(tuple, vector.unflatten(0, (-1, self.block)).tolist()):
                owners = {
                    i for i, p in enumerate(producers) for c in block if p.start <= c < p.start + p.channels
                }
                if len(owners) != 1 or len(set(block)) != len(block):
                    return "a block spans several producers"
                if any(block_of.setdefault(c, block) != block for c in block):
                    return "its readers group the channels differently"
        return ""


class _Channels:
    """Numbers of channels as they flow from producers: by node, and those that something else reads, with who does."""

    def __init__(self, numbers: dict[Node, tuple[Any, Any]]) -> None:
        self.numbers = numbers
        self.leaks: dict[int, str] = {}

    def leak(self, node: Node, by: Node) -> None:
        words = f"{op_name(by) or by.op} ({by.name}) reads it too"
        for tensor in pytree.tree_leaves(self.numbers[node][0]) if node in self.numbers else ():
            self.leaks.update(dict.fromkeys(tensor.unique().tolist(), words))


def _sharing(read: Mapping[Node, Tensor], group: set[int]) -> tuple[dict[Node, Tensor], set[int]]:
    """Return every reader that shares a channel with the group, or with one that does; and the channels of them all."""
    taking: dict[Node, Tensor] = {}
    while grown := {u: v for u, v in read.items() if u not in taking and group & set(v.tolist())}:
        taking |= grown
        group = group | {i for v in grown.values() for i in v.tolist()}
    return taking, group


def _argument(node: Node, numbers: Mapping[Node, tuple[Any, Any]], index: int) -> Any:
    if node in numbers:
        return numbers[node][index]
    value = meta_value(node)
    if isinstance(value, Tensor):
        return torch.full(_shape(value), -1)
    return _size(value)


def _shape(value: Tensor) -> list[int]:
    """Return the shape, with the batch size of capture's example if the batch is dynamic."""
    return [_size(d) for d in value.shape]


def _size(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)  # type: ignore[arg-type]
