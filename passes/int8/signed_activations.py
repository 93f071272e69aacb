"""Store activations as signed bytes, the ones that the tensor cores of GPUs multiply."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.passes.int8.byte_activations import BYTE
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

ops = torch.ops.quantized_decomposed
SHIFT = 128
SIGNED = (BYTE.quant_min - SHIFT, BYTE.quant_max - SHIFT, torch.int8)


@declare(after=("convert", "rescale_temporal", "rescale_tokens", "byte_activations"))
def signed_activations(gm: GraphModule) -> PassResult:
    """Subtract 128 from the integers of unsigned bytes and from their zero points. Bitwise unchanged.

    dequantize(quantize(x, s, z, 0, 255, uint8), ..)  ==>  dequantize(quantize(x, s, z - 128, -128, 127, int8), ..)

    Integers that something else than a dequantization reads stay as they are.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    for node in module.graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default):
        _, scale, zero_point, *limits = node.args
        readers = list(node.users)
        if limits != [BYTE.quant_min, BYTE.quant_max, BYTE.dtype] or any(
            u.target is not ops.dequantize_per_tensor.default or u.args[1:] != node.args[1:] for u in readers
        ):
            continue
        for n in (node, *readers):
            n.args = (n.args[0], scale, zero_point - SHIFT, *SIGNED)
        if "val" in node.meta:
            node.meta["val"] = node.meta["val"].to(torch.int8)
        modified = True
    return modified
