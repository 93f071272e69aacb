"""Layers as the low-bit passes see them: weights with a row for each input channel, replaced in place."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.mapped import outgrows
from tfmq_fx.base.offloaded import home_of, loaded, lying_as
from tfmq_fx.graph.nodes import (
    attribute,
    edge_layers,
    groups_of,
    op_name,
    output_channel_axis,
    plain_strides,
    weight_argument,
)
from tfmq_fx.graph.state import Change, captured_of, set_state


@dataclass(frozen=True, kw_only=True)
class ParameterLayer:
    """A convolution or linear whose weight is a parameter that no other node reads."""

    gm: GraphModule
    node: Node
    path: str  # of the weight

    @property
    def weight(self) -> Tensor:
        """Return the weight as it is now; passes replace it."""
        weight: Tensor = attribute(self.gm, self.path).detach()
        return weight

    @property
    def x(self) -> Node:
        x = self.node.args[0]
        assert isinstance(x, Node)
        return x

    @property
    def axis(self) -> int:
        """Return the channel dimension of the layer's input and output, counted from the end."""
        return channel_axis(self.node, self.weight)

    @property
    def groups(self) -> int:
        return groups_of(self.node)

    @property
    def transposed(self) -> bool:
        return output_channel_axis(self.node) == 1

    def by_input(self) -> Tensor:
        """Return the weight as (C_in, ...), one row for each input channel. `from_input` is the inverse."""
        w = loaded(self.weight)
        if self.transposed:  # (C_in, C_out / groups, ...)
            return w.flatten(1)
        # groups, C_out / groups, C_in / groups, ...
        rows: Tensor = w.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
        return rows

    def from_input(self, rows: Tensor) -> Tensor:
        """Return rows, as from `by_input`, in the shape of the weight."""
        if self.transposed:
            return rows.reshape(self.weight.shape)
        out, each, *kernel = self.weight.shape
        w = rows.reshape(self.groups, each, out // self.groups, *kernel)
        result: Tensor = w.transpose(1, 2).reshape(self.weight.shape)
        return result


def channel_axis(layer: Node, weight: Tensor) -> int:
    """Return the channel dimension of a layer's input and output, counted from the end."""
    return -1 if op_name(layer) == "linear" else 1 - weight.dim()


def choose_layers(
    gm: GraphModule, temporal: Iterable[str], *, timestep: str
) -> tuple[list[ParameterLayer], list[Change]]:
    """Return the layers that low-bit passes change, and a `Change` with the reason for each that they leave.

    They leave first and last layers, and layers whose weight is not a parameter of their own. Layers of the
    temporal block are in neither list.

    temporal: names of the temporal block's nodes; timestep: the name of the input it starts from.
    """
    inside, edges, readers = set(temporal), edge_layers(gm, timestep=timestep), count_readers(gm)
    layers, left = [], []
    for node in gm.graph.nodes:
        index = weight_argument(node)
        if index is None or node.name in inside:
            continue
        layer = layer_of(gm, node, readers)
        if layer is None:
            left.append(Change(name=node.name, how="left", reason="its weight is not a parameter of its own"))
        elif node in edges:
            left.append(Change(name=layer.path, how="left", reason="first or last layer"))
        else:
            layers.append(layer)
    return layers, left


def require_float_graph(gm: GraphModule, step: str) -> None:
    """Raise TFMQError for a graph that went through `prepare`: its observers have seen the weights as they were."""
    if stage := captured_of(gm).stage:
        raise TFMQError(f"{step}: the graph is {stage} already; it works on the float graph, before prepare.")


def record_changes(gm: GraphModule, step: str, changes: Iterable[Change]) -> None:
    """Note in the graph's state what a low-bit pass did to each layer."""
    state = captured_of(gm)
    set_state(gm, dataclasses.replace(state, low_bits={**state.low_bits, step: tuple(changes)}))


def set_tensor(gm: GraphModule, target: str, value: Tensor, *, mapped: bool = False) -> None:
    """Replace the tensor that a get_attr of `target` returns, in this graph module only; the dtype stays.

    mapped: let it lie in a file that is mapped to memory (`outgrow`).
    """
    *path, name = target.split(".")
    module = gm.get_submodule(".".join(path))
    old: Tensor = getattr(module, name)
    value = lying_as(old, plain_strides(value.to(old.dtype).reshape(old.shape)), mapped=mapped)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, value)


def outgrow(layers: Iterable[ParameterLayer], max_memory: float) -> bool:
    """Return True if the layers' weights on the CPU take more than `max_memory` GiB: rewritten ones then lie on disk.

    Raises TFMQError if the disk is too small.
    """
    size = sum(w.nbytes for layer in layers if home_of(w := layer.weight).type == "cpu")
    return outgrows(size, max_memory * 2**30, "the rewritten weights need", "raise Reconstruction.max_memory")


def count_readers(gm: GraphModule) -> Counter[str]:
    """Return how many nodes read each parameter."""
    found: Counter[str] = Counter()
    for node in gm.graph.find_nodes(op="get_attr"):
        found[str(node.target)] += len(node.users)
    return found


def layer_of(gm: GraphModule, node: Node, readers: Mapping[str, int]) -> ParameterLayer | None:
    """Return the layer of a node, or None if it is not a `ParameterLayer`. readers: from `count_readers`."""
    index = weight_argument(node)
    if index is None or any(isinstance(v, Node) for v in node.kwargs.values()) or len(node.args) <= index:
        return None
    weight = node.args[index]
    if not isinstance(weight, Node) or weight.op != "get_attr" or readers[str(weight.target)] != 1:
        return None
    return ParameterLayer(gm=gm, node=node, path=str(weight.target))
