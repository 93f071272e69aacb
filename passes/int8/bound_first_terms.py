"""Keep a difference from a dequantized activation as it is written, for engines that move scales through it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


@declare(after=("convert", "rescale_temporal", "byte_activations"))
def bound_first_terms(gm: GraphModule) -> PassResult:
    """Put a bound that never binds between a dequantized activation and what it is subtracted from. Bitwise unchanged.

        y = dequantize(q, s, z, low, high)
        x - y               ==>  x - clamp_max(y, (high - z + 1) * s)
        x - (y - z_t) * s_t ==>  x - (clamp_max(y, ..) - z_t) * s_t

    So the second of two terms (`Rule.activation_terms`) reads the first. OpenVINO would compute x - (q - z) * s as
    (x / s + z - q) * s: in bfloat16, a byte of x / s + z leaves no bits for what the byte lost. Its integer kernels
    move no scale through a minimum.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    for difference in module.graph.find_nodes(op="call_function", target=aten.sub.Tensor):
        reader, value = difference, difference.args[1]
        while isinstance(value, Node) and value.target in (aten.mul.Tensor, aten.sub.Tensor):
            reader, value = value, value.args[0]
        if isinstance(value, Node) and value.target is _DEQUANTIZE:
            qparams: Any = value.args
            _, scale, zero_point, _, high, *_ = qparams
            above = (high - zero_point + 1) * scale
            with module.graph.inserting_after(value):
                bounded = module.graph.call_function(aten.clamp_max.default, (value, above))
            bounded.meta = {k: v for k, v in value.meta.items() if k == "val"}
            reader.replace_input_with(value, bounded)
            modified = True
    return modified
