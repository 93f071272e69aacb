"""Weights as signed bytes with a zero point."""

import torch

from tests.helpers.int8_passes import QDQ, assert_the_values_stay, graph
from tfmq_fx.passes import signed_weights


def test_the_values_stay_bit_for_bit():
    gm, count = graph(), {f"{QDQ}.dequantize_per_channel.default": 13}
    got, expected = assert_the_values_stay(gm, signed_weights, count, count)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    kinds = {n.args[-1] for n in gm.graph.nodes if "dequantize_per_channel" in str(n.target)}
    assert kinds == {torch.int8}
