"""Widen activations of fewer than 8 bits to the bytes that int8 kernels read."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.arithmetic import IntegerRange
from tfmq_fx.graph.nodes import aten
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

ops = torch.ops.quantized_decomposed
BYTE = IntegerRange.activation(8)


@declare(after=("convert", "rescale_temporal"))
def byte_activations(gm: GraphModule) -> PassResult:
    """Replace a narrow range by a clamp and the whole byte, with the same scale and zero point.

    Bitwise unchanged.

    quantize(x, s, z, 0, 15)  ==>  quantize(clamp(x, (0 - z) * s, (15 - z) * s), s, z, 0, 255)
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    limits = (BYTE.quant_min, BYTE.quant_max, BYTE.dtype)
    modified = False
    for node in module.graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default):
        x, scale, zero_point, low, high, dtype = node.args
        if dtype != BYTE.dtype or (low, high) == limits[:2]:
            continue
        with module.graph.inserting_before(node):
            ends = ((low - zero_point) * scale, (high - zero_point) * scale)
            clamped = module.graph.call_function(aten.clamp.default, (x, *ends))
        clamped.meta = {k: v for k, v in x.meta.items() if k == "val"}
        for user in (node, *node.users):  # they read the same integers, in the same type
            user.args = (user.args[0], scale, zero_point, *limits)
        node.args = (clamped, scale, zero_point, *limits)
        modified = True
    return modified
