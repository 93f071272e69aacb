"""Fold constants: compute once what a graph computes from them."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule, Node

from tfmq_fx.graph.constants import values_of
from tfmq_fx.graph.nodes import set_buffer, weight_argument


def fold_weights(gm: GraphModule, layers: Iterable[Node] | None = None) -> None:
    """Fold the constant weights of layers that compute in float: dequantize(w) ==> get_attr.

    layers: the layers to fold. None: all layers that still read such a weight because they have no int8
        kernel.
    """
    for node in list(gm.graph.nodes if layers is None else layers):
        index = weight_argument(node)
        weight = None if index is None else node.args[index]
        if isinstance(weight, Node) and weight.op == "call_function" and _is_constant(weight):
            fold(gm, weight, f"{node.name}_weight")
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _is_constant(node: Node) -> bool:
    if node.op != "call_function":
        return node.op == "get_attr"
    return all(_is_constant(n) for n in node.all_input_nodes)


def fold(gm: GraphModule, node: Node, target: str) -> None:
    """Replace a node that depends on constants alone by a buffer `target` with its value."""
    set_buffer(gm, target, values_of(gm, [node])[node])
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(target)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    gm.graph.erase_node(node)


def keep_what_is_read(gm: GraphModule) -> None:
    """Drop parameters and buffers that no node reads, such as integers that kernels hold in another form."""
    read = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
    for path, module in list(gm.named_modules()):
        for name in [*module._parameters, *module._buffers]:
            if ".".join(filter(None, (path, name))) not in read:
                delattr(module, name)
