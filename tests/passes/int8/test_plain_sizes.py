"""Sizes by products, quotients, sums and differences alone."""

import operator

import torch
from torch import nn

from tfmq_fx.graph.fakes import set_fake_values
from tfmq_fx.graph.nodes import aten, op_name
from tfmq_fx.passes.int8.plain_sizes import plain_sizes

X = torch.randn(2, 8, 6, 6)


def graph_of(make):
    """Return a graph that views x (N, C, 6, 6) by the sizes that `make` computes."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.view.default, (x, make(graph.call_function, x))))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    set_fake_values(gm, {"x": X}, dynamic={"x": {0, 1}})
    return gm


def operators(gm):
    return [op_name(n) or n.target.__name__ for n in gm.graph.nodes if n.op == "call_function"]


def test_a_number_of_values_is_a_product_of_sizes():
    gm = graph_of(lambda call, x: [call(operator.floordiv, (call(aten.sym_numel.default, (x,)), 36)), 36])
    assert plain_sizes(gm).modified
    assert not [n for n in gm.graph.nodes if n.target is aten.sym_numel.default]
    for x in (X, X[:1, :3].contiguous()):
        assert torch.equal(gm(x), x.flatten(0, 1).flatten(1))
    assert not plain_sizes(gm).modified


def test_a_remainder_and_a_negative_are_differences():
    def sizes(call, x):
        channels = call(aten.sym_size.int, (x, 1))
        some = call(operator.mod, (channels, 5))  # 3 of 8, 1 of 6
        return [-1, call(operator.sub, (0, call(operator.neg, (some,))))]

    gm = graph_of(sizes)
    assert plain_sizes(gm).modified
    targets = {n.target for n in gm.graph.nodes}
    assert not {operator.mod, operator.neg} & targets
    for channels, size in ((8, 3), (6, 1)):
        x = torch.randn(2, channels, 6, 6)
        assert torch.equal(gm(x), x.view(-1, size))
