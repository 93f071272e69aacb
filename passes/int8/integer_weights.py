"""Rewrite quantized weights to the one form that int8 kernels take: signed bytes, zero point 0."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.arithmetic import centred
from tfmq_fx.graph.nodes import aten, attribute, set_buffer
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

SUFFIX = "_int8"  # of the buffer that holds the bytes


@declare(after=("convert", "rescale_temporal"))
def integer_weights(gm: GraphModule) -> PassResult:
    """Store q - z of weights as int8: dequantize_per_channel(q, s, z)  ==>  to(q - z, float32) * s.

    Bitwise unchanged. For an affine weight of at most 7 bits, q - z fits in a signed byte. Where it does not
    fit, q is kept and the graph subtracts z.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    call = module.graph.call_function
    for node in module.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.dequantize_per_channel.default
    ):
        if any(n.op != "get_attr" for n in node.all_input_nodes):
            continue
        source, axis = node.args[0], node.args[3]
        q, scale, zero_point = (attribute(module, str(a.target)) for a in node.args[:3])
        shape = [-1 if i == axis else 1 for i in range(q.dim())]
        signed = centred(q, zero_point, axis)
        set_buffer(module, f"{source.target}{SUFFIX}", q if signed is None else signed)
        set_buffer(module, f"{source.target}_factor", scale.float().reshape(shape))
        with module.graph.inserting_before(node):
            value = module.graph.get_attr(f"{source.target}{SUFFIX}")
            value = call(aten._to_copy.default, (value,), {"dtype": torch.float32})
            if signed is None:
                set_buffer(module, f"{source.target}_offset", zero_point.float().reshape(shape))
                value = call(aten.sub.Tensor, (value, module.graph.get_attr(f"{source.target}_offset")))
            value = call(aten.mul.Tensor, (value, module.graph.get_attr(f"{source.target}_factor")))
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        modified = True
    return modified
