"""Give constant qparams to activations with a scale per token, for kernels prepared once."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.arithmetic import IntegerRange
from tfmq_fx.graph.nodes import aten, op_name
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

ops = torch.ops.quantized_decomposed
BYTE = IntegerRange.activation(8)


@declare(after=("convert",))
def rescale_tokens(gm: GraphModule) -> PassResult:
    """Move the scales per token, computed at run time with zero point 0, behind the linears that read them.

        x' = dequantize_per_token(quantize_per_token(x, s, 0), s, 0)
        linear(x', W, b)             ==>   linear(y, W) * s + b,   y = dequantize(quantize(x * (1 / s), 1, 128), 1, 128)
        every other user of x'       ==>   y * s

    s is the token's largest magnitude over quant_max, so x / s is within the bounds without a clamp. The
    integers become unsigned, as the x86 kernels and onnxruntime's fusions require.

    Numerics: y has bitwise the same integers. A linear multiplies by s once per sum, not once per product.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    for node in module.graph.find_nodes(op="call_function", target=ops.dequantize_per_token.default):
        if node.args[0].target is ops.quantize_per_token.default:
            _rescale(module, node)
            modified = True
    return modified


def _rescale(gm: GraphModule, dequantize: Node) -> None:
    call = gm.graph.call_function
    x, s, *_ = dequantize.args[0].args  # type: ignore[union-attr]
    qparams = (1.0, 128, BYTE.quant_min, BYTE.quant_max, BYTE.dtype)
    with gm.graph.inserting_before(dequantize):
        scaled = call(aten.mul.Tensor, (x, call(aten.reciprocal.default, (s,))))
        q = call(ops.quantize_per_tensor.default, (scaled, *qparams))
        y = call(ops.dequantize_per_tensor.default, (q, *qparams))
    y.meta = dict(dequantize.meta)
    for layer in list(dequantize.users):
        if op_name(layer) == "linear" and layer.args[0] is dequantize and not layer.kwargs:
            bias = layer.args[2] if len(layer.args) > 2 else None
            with gm.graph.inserting_before(layer):
                total = call(aten.linear.default, (y, layer.args[1]))
                value = call(aten.mul.Tensor, (total, s))
                value = value if bias is None else call(aten.add.Tensor, (value, bias))
            total.meta, value.meta = dict(layer.meta), dict(layer.meta)
            layer.replace_all_uses_with(value)
            gm.graph.erase_node(layer)
    if dequantize.users:
        with gm.graph.inserting_before(dequantize):
            value = call(aten.mul.Tensor, (y, s))
        value.meta = dict(dequantize.meta)
        dequantize.replace_all_uses_with(value)
