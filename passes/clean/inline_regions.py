"""Put the operators that torch.export hid in a region of their own back into the graph: with its own autocast or grad
mode, or chosen by a condition that never changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.constants import constants, values_of
from tfmq_fx.graph.nodes import attribute, meta_value, paste, put_in_place

_AUTOCAST, _GRAD, _COND = "wrap_with_autocast", "wrap_with_set_grad_enabled", "cond"


def inline_regions(gm: GraphModule) -> PassResult:
    """Inline regions: wrap_with_autocast(.., enabled=False, region, x, w) ==> linear(x, w). Bitwise unchanged.

    They come from `with torch.autocast(.., enabled=False)` and `with torch.enable_grad()` in a forward. A
    captured graph computes without autocast anyway, and the grad mode does not change values. Of torch.cond with a
    condition that is a number, or a function of buffers and parameters alone, the branch that it chooses stays:
    cond(flag, yes, no, [x]) ==> linear(x, w).

    Raises TFMQError for a region that computes in autocast, and for other operators with graphs of their own, such
    as torch.cond of an input: no pass would see the layers in there.
    """
    modified = False
    while regions := [n for n in gm.graph.nodes if graph_in(gm, n) is not None]:
        for node in regions:  # a region may hold further ones
            _inline(gm, node, *_region(gm, node))
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


def _region(gm: GraphModule, node: Node) -> tuple[Node, Sequence[Any]]:
    """Return the node of the graph that an operator runs in every call, and that graph's inputs.

    Raises TFMQError if it may run another one, or in another way than a call of the graph would.
    """
    region = graph_in(gm, node)
    assert region is not None
    assert isinstance(node.target, HigherOrderOperator)
    name = node.target.name()
    if name == _COND and (chosen := _chosen(gm, node)) is not None:
        return chosen, node.args[3]  # type: ignore[return-value]
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
    return region, node.args[node.args.index(region) + 1 :]


def _chosen(gm: GraphModule, cond: Node) -> Node | None:
    """Return the node of the branch that torch.cond takes in every call, or None if that depends on an input."""
    flag, yes, no, _ = cond.args
    if isinstance(flag, Node):
        if flag not in constants(gm):
            return None
        flag = values_of(gm, [flag])[flag]
    return yes if flag else no  # type: ignore[return-value]


def _devices(gm: GraphModule) -> set[str]:
    """Return the types of the devices on which the graph computes. Autocast for others changes nothing."""
    values = [*gm.parameters(), *gm.buffers(), *(meta_value(n) for n in gm.graph.nodes)]
    return {value.device.type for value in values if isinstance(value, Tensor)}


def _inline(gm: GraphModule, node: Node, region: Node, taken: Sequence[Any]) -> None:
    """Replace an operator by the nodes of the graph that it runs. taken: the graph's inputs."""
    inner: GraphModule = attribute(gm, str(region.target))
    given: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), taken, strict=True))
    graphs = [n for n in node.all_input_nodes if n.op == "get_attr"]
    with gm.graph.inserting_before(node):
        result = paste(gm.graph, inner.graph, given, prefix=str(region.target))
    put_in_place(node, result)
    for unread in (n for n in graphs if not n.users):
        gm.graph.erase_node(unread)
