"""Rewrite what layers and products read as float arithmetic on the same integers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tfmq_fx.graph.nodes import aten, matmul_inputs

ops = torch.ops.quantized_decomposed


def multiply_in_float(gm: GraphModule, products: Iterable[Node]) -> None:
    """Round the activations that these layers and products read in float: dequantize(quantize(x)) ==> clamp(round(x / s)) * s.

    The numbers are the same, but no int8 kernel takes them.
    """
    for node in products:
        for x in matmul_inputs(node) or node.all_input_nodes[:1]:
            if x.target is ops.dequantize_per_tensor.default:
                node.replace_input_with(x, _rounded(gm, x))
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _rounded(gm: GraphModule, pair: Any) -> Node:
    q, scale, zero_point, low, high, _ = pair.args
    y: Node = q.args[0]
    steps = (
        (aten.mul.Tensor, (1.0 / scale,)),
        (aten.round.default, ()),
        (aten.clamp.default, (low - zero_point, high - zero_point)),
        (aten.mul.Tensor, (scale,)),
    )
    with gm.graph.inserting_before(pair):
        for target, args in steps:
            y = gm.graph.call_function(target, (y, *args))
            y.meta = {k: v for k, v in pair.meta.items() if k == "val"}
    return y
