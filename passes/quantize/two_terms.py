"""Give layers their input in two integer terms, where one of 8 bits is too coarse."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import aten, meta_value, weight_argument
from tfmq_fx.observers.residual import ResidualFakeQuantize
from tfmq_fx.passes.quantize.plan import LayerPlan


def add_second_terms(gm: GraphModule, layers: Iterable[LayerPlan]) -> list[Node]:
    """Add the second term to every layer of a prepared graph that asks for two; return the new observers' nodes.

        conv(observer(x), w, b)  ==>  y = observer(x);  conv(y, w, b) + conv(observer_2(x - y, x), w)

    Both products read the same weight. While nothing is rounded, the second is 0.
    Raises TFMQError for a layer whose input is not quantized.
    """
    nodes = {n.name: n for n in gm.graph.nodes}
    terms: dict[Node, Node] = {}
    for planned in layers:
        if planned.activation_terms == 2:
            layer = nodes[planned.node]
            first = layer.args[0]
            if not can_have_two(layer) or not isinstance(first, Node) or first.op != "call_module":
                raise TFMQError(
                    f"{planned.path}: activation_terms=2, but its input is not quantized; give it activation_bits of at most 8."
                )
            with gm.graph.inserting_after(first):
                if first not in terms:
                    terms[first] = _second(gm, first, bits=planned.activation_bits)
            _sum(gm, layer, terms[first])
    return list(terms.values())


def can_have_two(layer: Node) -> bool:
    """Return True if the layer is f(x, w, b, ..) with its bias, or none, in third place."""
    return weight_argument(layer) == 1 and not layer.kwargs


def is_sum_of_terms(node: Node) -> bool:
    """Return True if this adds two layers with the same weight. It looks like a residual connection, but is not one."""
    layers = [n for n in node.args if isinstance(n, Node) and weight_argument(n) == 1]
    return node.target is aten.add.Tensor and len(layers) == 2 and layers[0].args[1] is layers[1].args[1]


def _second(gm: GraphModule, first: Node, *, bits: int) -> Node:
    x, path = first.args[0], f"{first.name}_second_term"
    assert isinstance(x, Node)
    observer, like = ResidualFakeQuantize(bits=bits), meta_value(x)
    gm.add_submodule(path, observer.to(like.device) if isinstance(like, Tensor) else observer)
    left = gm.graph.call_function(aten.sub.Tensor, (x, first))
    with gm.graph.inserting_after(left):
        second = gm.graph.call_module(path, (left, x))
    left.meta, second.meta = dict(x.meta), dict(x.meta)
    return second


def _sum(gm: GraphModule, layer: Node, second: Node) -> None:
    _, weight, *rest = layer.args
    with gm.graph.inserting_after(layer):
        product = gm.graph.call_function(layer.target, (second, weight, None, *rest[1:]))  # type: ignore[arg-type]
    with gm.graph.inserting_after(product):
        total = gm.graph.call_function(aten.add.Tensor, (layer, product))
    product.meta, total.meta = dict(layer.meta), dict(layer.meta)
    layer.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
