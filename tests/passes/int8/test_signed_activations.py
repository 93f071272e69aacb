"""Activations as signed bytes."""

import torch
from torch import nn

from tests.helpers.int8_passes import exported_batch
from tfmq_fx.passes import signed_activations

ops = torch.ops.quantized_decomposed
BYTE = (0.05, 100, 0, 255, torch.uint8)


class Read(nn.Module):
    """x quantized twice: dequantized, and with integers that something else reads."""

    def forward(self, *x):
        y = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x[0], *BYTE), *BYTE)
        return y, ops.quantize_per_tensor.default(x[0] * 2, *BYTE) + 1


def test_integers_move_by_128_and_values_stay_bit_for_bit():
    gm = exported_batch(Read(), torch.randn(2, 3))
    x = torch.randn(40, 3) * 10  # beyond both ends
    expected = gm(x)
    assert signed_activations(gm).modified
    found = [
        n.args[2:] for n in gm.graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default)
    ]
    assert found == [(-28, -128, 127, torch.int8), BYTE[1:]]  # the second one is read as it is
    assert all(torch.equal(a, b) for a, b in zip(gm(x), expected, strict=True))
    assert not signed_activations(gm).modified
