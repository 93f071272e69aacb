"""A graph returns of one row what its network does, where the network squeezes."""

import pytest
import torch
from torch import nn

import tfmq_fx
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name

X, T = torch.randn(3, 8), torch.tensor([0.5, 1.0, 2.0])


class Squeezes(nn.Module):
    """kind: how it squeezes."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.time, self.a, self.b = nn.Linear(2, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, sigma):
        s = sigma.squeeze()
        if s.dim() == 0 and self.kind != "several rows alone":
            s = s[None].repeat(len(x))
        if self.kind == "another for one row" and len(x) == 1:
            s = s + 1
        s = s.log()[:, None]
        y = self.b(torch.relu(self.a(x) + self.time(torch.cat([s.sin(), s.cos()], 1))))
        return {
            "output": y.squeeze(),
            "outputs": (y.squeeze(0), y[:, None].squeeze(0), y[:, None]),
            "output and back": y.squeeze()[None] if len(x) == 1 else y.squeeze(),
        }.get(self.kind, y)


def captured(kind):
    torch.manual_seed(0)
    network = Squeezes(kind).eval()
    return network, tfmq_fx.capture(network, {"x": X[:2], "sigma": T[:2]}, timestep="sigma")


@pytest.mark.parametrize("kind", ["inside", "output", "outputs", "output and back"])
@torch.no_grad()
def test_any_number_of_rows_is_what_the_network_makes_of_it(kind):
    network, gm = captured(kind)
    for rows in (1, 2, 3):
        made, expected = gm(X[:rows], T[:rows]), network(X[:rows], T[:rows])
        torch.testing.assert_close(
            made, expected, rtol=1e-6, atol=1e-6
        )  # products of one row round in another way


def test_outputs_are_squeezed_at_the_end():
    _, gm = captured("outputs")
    *_, last = [n for n in gm.graph.nodes if n.op == "call_function"]
    found = [
        (n.args[0].name, n.target) for n in gm.graph.output_node().all_input_nodes if op_name(n) == "squeeze"
    ]
    assert [target for _, target in found] == [torch.ops.aten.squeeze.default, torch.ops.aten.squeeze.dims]
    assert op_name(last) == "squeeze"


@torch.no_grad()
def test_a_network_of_several_rows_alone_has_a_graph_of_any_number():
    network, gm = captured("several rows alone")
    with pytest.raises(IndexError):
        network(X[:1], T[:1])
    torch.testing.assert_close(gm(X[:1], T[:1]), network(X, T)[:1], rtol=1e-6, atol=1e-6)


def test_another_result_for_one_row_is_refused():
    with pytest.raises(
        TFMQError, match=r"Squeezes: computes something else of one row .* as x\.squeeze\(1\) does"
    ):
        captured("another for one row")


def test_what_is_not_finite_is_compared_in_shape():
    torch.manual_seed(0)
    network = Squeezes("output").eval()
    gm = tfmq_fx.capture(network, {"x": X[:2], "sigma": torch.tensor([0.0, 1.0])}, timestep="sigma")
    assert gm(X[:1], T[:1]).shape == network(X[:1], T[:1]).shape == (8,)
