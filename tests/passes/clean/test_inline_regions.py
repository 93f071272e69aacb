"""Parts of a forward with their own autocast or grad mode become plain nodes."""

import pytest
import torch
from torch import nn

import tfmq_fx
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import find_temporal, inline_regions, prepare

X, T = torch.randn(2, 4), torch.tensor([1, 2])


class Regions(nn.Module):
    """A layer outside, one in a region without autocast, and one in a region inside it with gradients."""

    def __init__(self):
        super().__init__()
        self.time, self.a, self.b, self.out = (
            nn.Linear(1, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )
        self.register_buffer("shift", torch.randn(4))

    def forward(self, sample, timestep):
        h = sample + self.time(timestep.float()[:, None])
        with torch.autocast("cpu", enabled=False):
            h = self.a(h.relu()) + self.shift
            first, second = h.chunk(2, dim=1)
            with torch.enable_grad():
                h = self.b(torch.cat([second, first], dim=1))
        with torch.autocast("cuda", enabled=False):
            pass
        return self.out(h + first.mean())


def graph(network):
    with torch.no_grad():
        return torch.export.export(network.eval(), (X, T), strict=False).module(check_guards=False)


def operators(gm):
    return [op_name(n) for n in gm.graph.nodes if n.op == "call_function"]


def test_the_operators_of_a_region_are_the_graphs_own():
    gm = graph(Regions())
    assert "wrap_with_autocast" in operators(gm)
    assert "chunk" not in operators(gm)
    assert inline_regions(gm).modified
    assert operators(gm).count("linear") == 4
    assert not [n for n in operators(gm) if n.startswith("wrap")]
    assert not [n for n in gm.graph.nodes if n.op == "get_attr" and n.target.startswith("submod")]
    assert not [name for name, m in gm.named_modules() if name.startswith("submod")]


def test_the_values_are_bitwise_the_same():
    network = Regions()
    gm = graph(network)
    inline_regions(gm)
    with torch.no_grad():
        assert torch.equal(gm(X, T), network(X, T))


def test_a_second_run_changes_nothing():
    gm = graph(Regions())
    inline_regions(gm)
    before = str(gm.graph)
    assert not inline_regions(gm).modified
    assert str(gm.graph) == before


def test_a_region_in_autocast_is_refused():
    class Half(Regions):
        def forward(self, sample, timestep):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.a(sample + self.time(timestep.float()[:, None]))
            return self.out(h.float())

    with pytest.raises(TFMQError, match="turns autocast to bfloat16 on for cpu"):
        inline_regions(graph(Half()))
    with pytest.raises(TFMQError, match="turns autocast to bfloat16 on for cpu"):
        tfmq_fx.capture(Half().eval(), {"sample": X, "timestep": T})


def test_an_operator_that_chooses_between_graphs_is_refused():
    class Chooses(Regions):
        def forward(self, sample, timestep):
            h = sample + self.time(timestep.float()[:, None])
            return self.out(torch.cond(h.sum() > 0, lambda h: self.a(h), lambda h: self.b(h), (h,)))

    with pytest.raises(TFMQError, match="node cond: cond runs a graph of its own"):
        tfmq_fx.capture(Chooses().eval(), {"sample": X, "timestep": T})


def test_a_branch_that_is_always_taken_stays():
    class Always(Regions):
        def __init__(self):
            super().__init__()
            self.register_buffer("deep", torch.tensor(1))

        def forward(self, sample, timestep):
            h = sample + self.time(timestep.float()[:, None])
            h = torch.cond(self.deep > 0, lambda h: self.a(h), lambda h: self.b(h), (h,))
            return self.out(torch.cond(self.deep > 1, lambda h: self.a(h), lambda h: self.b(h), (h,)))

    network = Always().eval()
    gm = tfmq_fx.capture(network, {"sample": X, "timestep": T})
    assert operators(gm).count("linear") == 4
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [str(n.args[1].target) for n in linears] == ["time.weight", "a.weight", "b.weight", "out.weight"]
    with torch.no_grad():
        assert torch.equal(gm(X, T), network(X, T))


def test_a_graph_with_regions_is_not_prepared():
    """Else their layers would stay in float, and no list would say so."""
    gm = graph(Regions())
    with pytest.raises(TFMQError, match=r"run passes\.inline_regions on the graph first"):
        prepare(gm, tfmq_fx.Recipe(), timesteps=T, temporal=find_temporal(gm, timestep="timestep"))


def test_no_layer_of_a_region_stays_in_float():
    gm = tfmq_fx.capture(Regions().eval(), {"sample": X, "timestep": T})
    prepared = prepare(gm, tfmq_fx.Recipe(), timesteps=T)
    planned = {layer.path for layer in tfmq_fx.passes.state_of(prepared).plan.layers}
    assert planned == {f"{name}.weight" for name in ("time", "a", "b", "out")}
