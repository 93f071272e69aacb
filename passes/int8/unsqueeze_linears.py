"""Give linears of rows a dimension more, for compilers that merge chains of matrix products into one kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten, meta_value
from tfmq_fx.passes.int8.flatten_linears import rounded_as, rounded_value
from tfmq_fx.passes.pass_manager import declare, rewrite_modules


@declare(after=("convert", "rescale_temporal", "byte_activations"))
def unsqueeze_linears(gm: GraphModule) -> PassResult:
    """Compute linears whose input is (N, C) on (N, 1, C). Bitwise unchanged, but for the order in which a kernel adds.

        linear(dequantize(quantize(x, ..), ..), W, b)
          ==>
        squeeze(linear(dequantize(quantize(unsqueeze(x, 1), ..), ..), W, b), 1)

    Layers that read the same x share the result. On one thread, OpenVINO 2026.4 makes one kernel of linears of two dimensions
    with an activation between them, such as those of a timestep: with GELU, Mish, tanh or sigmoid between quantized ones it
    runs out of registers, or ends the process.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    deeper: dict[Node, Node] = {}
    for node in list(module.graph.find_nodes(op="call_function", target=aten.linear.default)):
        x, y = node.args[0], meta_value(node)
        if not isinstance(x, Node) or not isinstance(y, Tensor) or y.dim() != 2:
            continue
        if x not in deeper:
            with module.graph.inserting_before(node):
                deeper[x] = _unsqueezed(x)
        with module.graph.inserting_after(node):
            result = module.graph.call_function(aten.squeeze.dims, (node, [1]))
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        result.meta = dict(node.meta)
        node.update_arg(0, deeper[x])
        _describe(node, y)
    return bool(deeper)


def _unsqueezed(x: Node) -> Node:
    """Return x with a dimension more; if it is quantized, this is given before, where OpenVINO does not take it away again."""
    value = rounded_value(x)
    source = x if value is None else value
    found = x.graph.call_function(aten.unsqueeze.default, (source, 1))
    _describe(found, meta_value(source))
    if value is None:
        return found
    rounded = rounded_as(x, found)
    for made, like in ((rounded.all_input_nodes[0], x.all_input_nodes[0]), (rounded, x)):
        made.meta = dict(like.meta)
        _describe(made, meta_value(like))
    return rounded


def _describe(node: Node, value: Any) -> None:
    """Give a node the fake value of another shape: `value` with a dimension more."""
    node.meta = {**node.meta, "val": value.unsqueeze(1)} if isinstance(value, Tensor) else node.meta
    node.meta.pop("tensor_meta", None)
