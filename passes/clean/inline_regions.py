"""Put the operators that torch.export hid in a region with its own autocast or grad mode back into the graph."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import attribute, meta_value

_AUTOCAST, _GRAD = "wrap_with_autocast", "wrap_with_set_grad_enabled"


def inline_regions(gm: GraphModule) -> PassResult:
    """Inline regions: wrap_with_autocast(.., enabled=False, region, x, w) ==> linear(x, w). Bitwise unchanged.

    They come from `with torch.autocast(.., enabled=False)` and `with torch.enable_grad()` in a forward. A
    captured graph computes without autocast anyway, and the grad mode does not change values.

    Raises TFMQError for a region that computes in autocast, and for operators with graphs of their own, such
    as torch.cond: no pass would see the layers in there.
    """
    modified = False
    while regions := [n for n in gm.graph.nodes if graph_in(gm, n) is not None]:
        for node in regions:  # a region may hold further ones
            _require_inlinable(gm, node)
            _inline(gm, node)
        modified = True
    if modified:
        gm.delete_all_unused_submodules()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def graph_in(gm: GraphModule, node: Node) -> Node | None:
    """Return the node of the first graph that an operator runs, or None if it runs none."""
    if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
        return None
    constants = [n for n in node.all_input_nodes if n.op == "get_attr"]
    return next((n for n in constants if isinstance(attribute(gm, str(n.target)), GraphModule)), None)


def _require_inlinable(gm: GraphModule, node: Node) -> None:
    assert isinstance(node.target, HigherOrderOperator)
    name = node.target.name()
    if name not in (_AUTOCAST, _GRAD):
        raise TFMQError(
            f"node {node.name}: {name} runs a graph of its own, in which no layer could be quantized; "
            "write its part of the forward without it."
        )
    if name == _AUTOCAST and node.args[2] and node.args[0] in _devices(gm):
        device, dtype, *_ = node.args
        raise TFMQError(
            f"node {node.name}: the network's forward turns autocast to {str(dtype).removeprefix('torch.')} on for {device}, "
            "but a quantized network computes in float32; take that `with torch.autocast` out of the forward."
        )


def _devices(gm: GraphModule) -> set[str]:
    """Return the types of the devices on which the graph computes. Autocast for others changes nothing."""
    values = [*gm.parameters(), *gm.buffers(), *(meta_value(n) for n in gm.graph.nodes)]
    return {value.device.type for value in values if isinstance(value, Tensor)}


def _inline(gm: GraphModule, node: Node) -> None:
    """Replace an operator by the nodes of the graph that it runs."""
    region = graph_in(gm, node)
    assert region is not None
    inner: GraphModule = attribute(gm, str(region.target))
    taken = node.args[node.args.index(region) + 1 :]
    given: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), taken, strict=True))
    with gm.graph.inserting_before(node):
        result: Any = gm.graph.graph_copy(inner.graph, given)
    for constant in inner.graph.find_nodes(op="get_attr"):
        given[constant].target = f"{region.target}.{constant.target}"
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(result[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not region.users:
        gm.graph.erase_node(region)
