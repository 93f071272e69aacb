"""Weights as signed bytes without a zero point."""

import pytest
import torch

from tests.helpers.int8_passes import BITS, LINEAR, Keyed, graph_of, operators
from tfmq_fx.passes import integer_weights


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@torch.no_grad()
def test_weights_become_signed_bytes_bit_for_bit(bits):
    module = Keyed(LINEAR[0], bits=bits)
    x, step = torch.randn(2, 6), torch.tensor([0, 1])
    gm = graph_of(module, x, step)
    expected = gm(x, step)
    assert integer_weights(gm).modified
    assert torch.equal(gm(x, step), expected)
    assert gm.q_int8.dtype == torch.int8
    assert operators(gm).count("sub") == 0
    assert not integer_weights(gm).modified


@torch.no_grad()
def test_a_weight_that_does_not_fit_a_signed_byte_keeps_its_zero_point():
    module = Keyed(LINEAR[0])
    module.q, module.zero_point = module.q.view(torch.uint8), torch.full((4,), 3, dtype=torch.int32)
    module.weights = BITS
    x, step = torch.randn(2, 6), torch.tensor([0, 1])
    gm = graph_of(module, x, step)
    expected = gm(x, step)
    integer_weights(gm)
    assert gm.q_int8.dtype == torch.uint8
    assert operators(gm).count("sub") == 1
    assert torch.equal(gm(x, step), expected)
