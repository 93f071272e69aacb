"""Where a graph rounds to float8_e4m3fn and back, read from its casts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base import float8
from tfmq_fx.graph.nodes import aten, attribute, op_name

# Between a constant scale, or a token's largest magnitude, and the products with it.
_OF_SCALES = ("view", "index_select", "select", "slice", "reciprocal", "clamp", "div")


class Dequantized(NamedTuple):
    """A product of float8 numbers and their scale."""

    q: Node  # the numbers
    scale: Node | float


def is_cast(node: Any, dtype: torch.dtype | None = None) -> bool:
    """Return True for a cast, to this dtype. None: to any."""
    is_call = isinstance(node, Node) and op_name(node) in ("to", "_to_copy") and bool(node.args)
    return is_call and (dtype is None or dtype in (*node.args[1:], *node.kwargs.values()))


def is_float8(node: Any) -> bool:
    """Return True for float8 numbers: a cast to them, or a constant."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return is_cast(node, float8.DTYPE)
    gm = node.graph.owning_module
    value = None if gm is None else attribute(gm, str(node.target))
    return isinstance(value, Tensor) and value.dtype == float8.DTYPE


def dequantized(node: Any) -> Dequantized | None:
    """Return what a node is the product of, if it is one of float8 numbers and a scale, cast to any dtype or not."""
    while is_cast(node) and not is_float8(node):
        node = node.args[0]
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor:
        return None
    wide, scale = node.args
    if not is_cast(wide, torch.float32) or not is_float8(wide.args[0]):  # type: ignore[union-attr]
        return None
    return Dequantized(wide.args[0], scale)  # type: ignore[union-attr, arg-type]


def quantized_from(q: Node) -> tuple[Node, ...]:
    """Return the nodes that round x to `q`, a cast to float8, from the first to the last but it; () if there are others.

    to(x, float32), * 1 / scale, clamp
    """
    clamp = q.args[0]
    product = clamp.args[0] if isinstance(clamp, Node) and clamp.target is aten.clamp.default else None
    wide = product.args[0] if isinstance(product, Node) and product.target is aten.mul.Tensor else None
    if not isinstance(wide, Node):
        return ()
    # A trace drops a cast to what x is.
    return (wide, product, clamp) if is_cast(wide, torch.float32) else (product, clamp)  # type: ignore[return-value]


def float8_weights(gm: GraphModule) -> Iterator[str]:
    """Yield the names of the constants of float8, those of its submodules too."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from (str(n.target) for n in module.graph.find_nodes(op="get_attr") if is_float8(n))


def scale_nodes(scale: object) -> list[Node]:
    """Return the nodes that compute a scale, from the last to the first, which is a constant or what is measured."""
    found = []
    while isinstance(scale, Node):
        found.append(scale)
        scale = scale.args[0] if op_name(scale) in _OF_SCALES else None
    return found


def float8_scales(gm: GraphModule) -> set[Node]:
    """Return the constants that are scales of float8 numbers, or tables of them."""
    pairs = (dequantized(node) for node in gm.graph.nodes)
    chains = (scale_nodes(pair.scale) for pair in pairs if pair is not None)
    return {chain[-1] for chain in chains if chain and chain[-1].op == "get_attr"}
