"""One scale per token becomes one scale."""

from tests.helpers.int8_passes import QDQ, assert_the_values_stay, graph
from tfmq_fx.passes import rescale_tokens


def test_the_values_stay():
    before = {f"{QDQ}.quantize_per_token.default": 4, f"{QDQ}.quantize_per_tensor.default": 5}
    after = {f"{QDQ}.quantize_per_tensor.default": 9}
    assert_the_values_stay(graph(activation_granularity="token"), rescale_tokens, before, after)
