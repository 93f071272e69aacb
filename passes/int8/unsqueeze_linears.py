"""Give linears of rows a dimension more, for compilers that merge chains of matrix products into one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten, meta_value
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


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
    rounded: list[Node] = []
    source, q = x, x.args[0] if x.args else None
    if isinstance(q, Node) and q.target is QUANTIZE and x.target is DEQUANTIZE:
        (source,), rounded = q.all_input_nodes, [q, x]
    found = x.graph.call_function(aten.unsqueeze.default, (source, 1))
    _describe(found, meta_value(source))
    for node in rounded:
        assert callable(node.target)
        found = x.graph.call_function(node.target, (found, *node.args[1:]), node.kwargs)
        found.meta = dict(node.meta)
        _describe(found, meta_value(node))
    return found


def _describe(node: Node, value: Any) -> None:
    """Give a node the fake value of another shape: `value` with a dimension more."""
    node.meta = {**node.meta, "val": value.unsqueeze(1)} if isinstance(value, Tensor) else node.meta
    node.meta.pop("tensor_meta", None)
