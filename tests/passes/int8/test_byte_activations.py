"""Narrow activations as whole bytes."""

import torch
from torch import nn
from torch.fx import GraphModule

from tests.helpers.int8_passes import operators, ops
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import byte_activations


class Static(nn.Module):
    def forward(self, x):
        limits = (0.1, 5, 0, 15, torch.uint8)
        return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *limits), *limits)


@torch.no_grad()
def test_narrow_activations_become_bytes_bit_for_bit():
    x = torch.randn(1000)
    gm = torch.export.export(Static(), (x,)).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    assert byte_activations(gm).modified
    assert operators(gm) == ["clamp", "quantize_per_tensor", "dequantize_per_tensor"]
    assert {n.args[3:] for n in gm.graph.nodes if "quantize" in op_name(n)} == {(0, 255, torch.uint8)}
    assert torch.equal(gm(x), Static()(x))
    assert not byte_activations(gm).modified
