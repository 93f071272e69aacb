"""Operators written by others, each kind traced once: the graph and the values of torch.export's own decompositions."""

from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F

from tfmq_fx.artefact.program import graph_of
from tfmq_fx.graph.fakes import set_fake_values
from tfmq_fx.graph.nodes import aten, fresh, op_name
from tfmq_fx.passes.int8 import decompose as module
from tfmq_fx.passes.int8.decompose import decompose

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions of one kind and of another, views whose sizes follow the batch, parts of a tensor, casts."""

    def __init__(self):
        super().__init__()
        self.same = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.other, self.norm = nn.Conv2d(8, 16, 1), nn.GroupNorm(4, 8)

    def forward(self, x):
        for layer in self.same:
            x = x + layer(F.silu(self.norm(x)))
        x, gate = self.other(x).chunk(2, dim=1)
        tokens = x.reshape(x.shape[0] * 2, 4, -1).contiguous()
        mixed = torch.einsum("bct,bdt->bcd", tokens, tokens).softmax(-1)
        y = (mixed @ tokens).reshape(x.shape).to(torch.float64) + 0.5
        y = y * torch.ones(x.shape[0], device=x.device)[:, None, None, None]
        return y.to(x.dtype) * torch.sigmoid(gate), F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2.0)


def program(network=None):
    network = network or Net()
    with torch.no_grad():
        return torch.export.export(
            network.eval(), (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
        )


def table(*kept):
    found = torch.export.default_decompositions()
    for op in kept:
        found.pop(op)
    return dict(found.items())


def prepared(of):
    gm = fresh(graph_of(of))
    set_fake_values(gm, {"x": X}, dynamic={"x": {0}})
    return gm


def operators(gm):
    return Counter(
        str(n.target)
        for n in gm.graph.nodes
        if n.op == "call_function" and op_name(n) not in ("_assert_tensor_metadata", "sym_size")
    )


@torch.no_grad()
def test_operators_and_values_are_those_of_torchs_own_decompositions():
    of, kept = program(), (aten.conv2d.default, aten.silu.default)
    gm = prepared(of)
    expected = graph_of(of.run_decompositions(table(*kept)))
    result = decompose(gm, table=table(*kept))
    assert result.modified
    assert operators(gm) == operators(expected)
    for size in (1, 2, 5):
        x = torch.randn(size, 8, 6, 6)
        assert all(map(torch.equal, gm(x), expected(x)))
    assert not decompose(gm, table=table(*kept)).modified


def test_equal_calls_are_traced_once(monkeypatch):
    made, trace = [], module.make_fx
    monkeypatch.setattr(module, "make_fx", lambda f, **kw: made.append(f) or trace(f, **kw))
    network = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)), nn.Conv2d(8, 8, 1))
    gm = prepared(program(network))
    decompose(gm, table=table())
    assert operators(gm) == {"aten.convolution.default": 4}
    assert len(made) == 2
    assert torch.equal(gm(X)[0], network(X))


def test_a_decomposition_that_writes_in_place_leaves_the_graph_as_it_was():
    def silu(x):
        return torch.sigmoid(x).mul_(x)

    gm = prepared(program(nn.SiLU()))
    before = str(gm.graph)
    assert decompose(gm, table={aten.silu.default: silu}) is None
    assert str(gm.graph) == before


@torch.no_grad()
def test_inputs_of_an_operator_may_become_one():
    """Both of baddbmm's matrices are x once the views that make them are replaced."""
    x = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1))
    graph = torch.fx.Graph()
    given = graph.placeholder("x")
    a = graph.call_function(aten.contiguous.default, (given,))
    b = graph.call_function(aten.expand_as.default, (given, given))
    graph.output((graph.call_function(aten.baddbmm.default, (given, a, b)),))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    set_fake_values(gm, {"x": x}, dynamic={"x": {0}})
    decompose(gm, table=table())
    assert not {"contiguous", "expand_as", "baddbmm"} & {op_name(n) for n in gm.graph.nodes}
    torch.testing.assert_close(gm(x)[0], torch.baddbmm(x, x, x))
