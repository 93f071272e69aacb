"""Store affine quantized weights as signed bytes with zero point 0, which int8 kernels take."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.arithmetic import centred
from tfmq_fx.graph.nodes import attribute, set_buffer
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

ops = torch.ops.quantized_decomposed


@declare(after=("convert", "rescale_temporal"))
def signed_weights(gm: GraphModule) -> PassResult:
    """Store affine quantized weights as signed bytes with zero point 0. Bitwise unchanged.

    dequantize_per_channel(q, s, z, axis, 0, high, uint8)
      ==>
    dequantize_per_channel(q - z, s, 0, axis, -128, 127, int8)

    For an affine weight of at most 7 bits, q - z fits in a signed byte. A weight for which it does not stays
    as it is.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    for node in module.graph.find_nodes(op="call_function", target=ops.dequantize_per_channel.default):
        source, scale, offset, axis, *_, dtype = node.args
        if dtype is not torch.uint8 or any(n.op != "get_attr" for n in node.all_input_nodes):
            continue
        q, zero_point = (attribute(module, str(n.target)) for n in (source, offset))
        signed = centred(q, zero_point, axis)
        if signed is None:
            continue
        names = f"{source.target}_signed", f"{offset.target}_signed"
        set_buffer(module, names[0], signed)
        set_buffer(module, names[1], torch.zeros_like(zero_point))
        with module.graph.inserting_before(node):
            new = [module.graph.get_attr(name) for name in names]
        node.args = (new[0], scale, new[1], axis, -128, 127, torch.int8)
        modified = True
    return modified
