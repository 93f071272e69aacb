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
        if x.target is not ops.dequantize_per_tensor.default or not isinstance(y, Tensor) or y.dim() < 3:
            continue
        quantize = x.args[0]
        if quantize.target is not ops.quantize_per_tensor.default:
            continue
        value = quantize.args[0]
        if x not in rows_of:
            with module.graph.inserting_before(x):
                columns = fixed_size(meta_value(x).shape[-1])
                rows = call(aten.reshape.default, (value, [-1, columns]))
                q = call(quantize.target, (rows, *quantize.args[1:]))
                rows_of[x] = call(x.target, (q, *x.args[1:]))
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
