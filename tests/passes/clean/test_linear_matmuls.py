"""Products with a matrix of parameters are linear layers."""

import torch
from torch import nn

import tfmq_fx
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import linear_matmuls

X, T = torch.randn(2, 5, 4), torch.tensor([1, 2])


class Products(nn.Module):
    """One by a parameter, one by a transposed and scaled one, two by tables, one of them learned, and one of two activations."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))
        self.register_buffer("frequencies", torch.randn(1, 6))
        self.learned = nn.Parameter(torch.randn(6))

    def forward(self, sample, timestep):
        t = timestep[:, None].float()
        emb = (t @ self.frequencies).sin() + (t @ self.learned[None]).cos()
        h = sample @ self.w + emb[:, None]
        return (h @ (self.v / 2).t()) @ (h.transpose(1, 2) @ h)[:, :4, :4]


def graph():
    torch.manual_seed(0)
    network = Products().eval()
    with torch.no_grad():
        return network, torch.export.export(network, (X, T), strict=False).module(check_guards=False)


def operators(gm):
    return [op_name(n) for n in gm.graph.nodes if op_name(n) in ("matmul", "linear")]


def test_products_with_parameters_are_linear():
    _, gm = graph()
    assert linear_matmuls(gm).modified
    # a table has no parameter under it, or one row, and the last two are products of activations
    assert operators(gm) == ["matmul", "matmul", "linear", "linear", "matmul", "matmul"]


def test_the_values_are_bitwise_the_same():
    network, gm = graph()
    linear_matmuls(gm)
    with torch.no_grad():
        assert torch.equal(gm(X, T), network(X, T))


def test_a_second_run_changes_nothing():
    _, gm = graph()
    linear_matmuls(gm)
    before = str(gm.graph)
    assert not linear_matmuls(gm).modified
    assert str(gm.graph) == before


def test_a_graph_without_shapes_is_left():
    _, gm = graph()
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    assert not linear_matmuls(gm).modified


def test_capture_finds_the_layers():
    network, _ = graph()
    gm = tfmq_fx.capture(network, {"sample": X, "timestep": T})
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [str(n.args[1].target) for n in linears] == ["w", "v"]
