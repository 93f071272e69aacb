"""Flatten the inputs of quantized linears to rows, the only form that int8 patterns of compilers know."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten, fixed_size, meta_value
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

ops = torch.ops.quantized_decomposed


@declare(after=("convert", "rescale_temporal"))
def flatten_linears(gm: GraphModule) -> PassResult:
    """Flatten the inputs of quantized linears to rows.

    linear(dequantize(quantize(x, ..), ..), W, b), x of (N, L, C)
      ==>
    reshape(linear(dequantize(quantize(reshape(x, (-1, C)), ..), ..), W, b), (N, L, -1))

    All elements of x have the same constant qparams, so x can be reshaped before it is quantized. Layers that
    read the same x share the result. The integers are bitwise unchanged; a matrix product may sum in another
    order.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    call = module.graph.call_function
    rows_of: dict[Node, Node] = {}
    for node in list(module.graph.find_nodes(op="call_function", target=aten.linear.default)):
        x, y = node.args[0], meta_value(node)
        value = rounded_value(x)
        if value is None or not isinstance(y, Tensor) or y.dim() < 3:
            continue
        if x not in rows_of:
            with module.graph.inserting_before(x):
                columns = fixed_size(meta_value(x).shape[-1])
                rows_of[x] = rounded_as(x, call(aten.reshape.default, (value, [-1, columns])))
        with module.graph.inserting_before(node):
            flat = call(aten.linear.default, (rows_of[x], *node.args[1:]), node.kwargs)
            sizes = [fixed_size(size) for size in y.shape]
            shape = [
                call(aten.sym_size.int, (value, i)) if size is None else size for i, size in enumerate(sizes)
            ]
            result = call(aten.reshape.default, (flat, shape))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
        modified = True
    return modified


def rounded_value(x: Node) -> Node | None:
    """Return what is quantized, and dequantized to x, with constant qparams for all its elements; None if x is anything else."""
    if x.target is not ops.dequantize_per_tensor.default:
        return None
    quantize = x.args[0]
    assert isinstance(quantize, Node)
    if quantize.target is not ops.quantize_per_tensor.default:
        return None
    value = quantize.args[0]
    assert isinstance(value, Node)
    return value


def rounded_as(x: Node, value: Node) -> Node:
    """Quantize and dequantize `value` as x was, of which `rounded_value` is a node, at the graph's point of insertion."""
    for node in (x.args[0], x):
        assert isinstance(node, Node)
        assert callable(node.target)
        value = x.graph.call_function(node.target, (value, *node.args[1:]), node.kwargs)
    return value
