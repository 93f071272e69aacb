"""Linear layers of sequences as products of two matrices."""

from tests.helpers.int8_passes import assert_the_values_stay, graph
from tfmq_fx.passes import flatten_linears


def test_the_values_stay():
    before, after = {"aten.reshape.default": 2}, {"aten.reshape.default": 2 + 6 + 6}
    assert_the_values_stay(graph(), flatten_linears, before, after)
