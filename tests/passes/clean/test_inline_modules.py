"""Module calls become functions."""

import torch
from torch import nn
from torch.fx import symbolic_trace

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, TinyUNet, make
from tests.helpers.graphs import RECIPE, T, X
from tfmq_fx.passes import inline_modules
from tfmq_fx.passes.quantize.state import state_of


def test_inlining_leaves_functions_with_the_parameters_own_paths():
    gm = symbolic_trace(make(TinyUNet))
    with torch.no_grad():
        expected = gm(X, T)
        assert inline_modules(gm).modified
        assert torch.equal(gm(X, T), expected)
    assert not gm.graph.find_nodes(op="call_module")
    named = dict(make(TinyUNet).named_parameters())
    assert {str(n.target) for n in gm.graph.find_nodes(op="get_attr")} >= set(named)
    assert not inline_modules(gm).modified


def test_a_module_that_cannot_be_followed_stays_and_is_reported():
    class Branch(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.odd, self.body = nn.Linear(1, 4), Branch(4, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return self.odd(self.body(sample) + self.time(timestep.float()[:, None]))

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m, _name):
            return isinstance(m, nn.Linear)

    network = Net().eval()
    gm = torch.fx.GraphModule(network, Leaves().trace(network))
    inline_modules(gm)
    assert [n.target for n in gm.graph.find_nodes(op="call_module")] == ["odd"]
    prepared = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS)
    assert ("odd", "a module call that inline_modules could not follow") in {
        (f.name, f.reason) for f in state_of(prepared).plan.floats
    }
