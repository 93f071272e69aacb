"""Layers of the temporal block compute each sample once, and what a network repeats is repeated behind them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.helpers.video import BLOCK, inputs, network
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.capturing.cleaning import cleaning
from tfmq_fx.graph.nodes import fresh, meta_value, op_name, weight_path
from tfmq_fx.passes import PassManager, find_temporal
from tfmq_fx.passes.temporal.sink_repeats import sink_repeats

# A product of a matrix with fewer rows is summed in another order: some units in the last place.
ROUNDINGS = {"rtol": 1e-5, "atol": 1e-6}


def exported(net, x, t, frames=2):
    """Capture without the pass."""
    dynamic = {
        "x": {0: torch.export.Dim.AUTO, frames: torch.export.Dim.AUTO},
        "timestep": {0: torch.export.Dim.AUTO},
    }
    forward = {"x": x, "timestep": t}
    program = torch.export.export(Named(net), (), forward, dynamic_shapes=dynamic, strict=False)
    gm = fresh(program.module(check_guards=False))
    passes = [p for p in cleaning("timestep") if getattr(p, "func", p) is not sink_repeats]
    PassManager(passes[:-1])(gm)
    return gm


class Named(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, timestep):
        torch._check(x.shape[0] == timestep.shape[0])
        return self.net(x, timestep)


def run(gm, *values):
    (y,) = pytree.tree_leaves(torch.fx.Interpreter(gm).run(*values))
    return y


def layers(gm):
    return {weight_path(n).removeprefix("net."): n for n in gm.graph.nodes if op_name(n) == "linear"}


@torch.no_grad()
def test_the_layers_of_a_network_for_videos_have_a_row_for_each_sample():
    net = network()
    gm = exported(net, *inputs(2))
    names = {path: n.name for path, n in layers(gm).items()}
    before = sorted(op_name(n) for n in gm.graph.nodes)
    assert sink_repeats(gm).modified
    found = layers(gm)
    batch = str(meta_value(gm.graph.find_nodes(op="placeholder")[1]).shape[0])
    assert {path: str(meta_value(found[path]).shape[0]) for path in BLOCK} == dict.fromkeys(BLOCK, batch)
    assert {path: n.name for path, n in found.items()} == names
    # One repeat became two, one of them in the shape that the network gave it.
    after = sorted(op_name(n) for n in gm.graph.nodes)
    changes = {n: after.count(n) - before.count(n) for n in {*before, *after}}
    assert {n: k for n, k in changes.items() if k} == {
        "repeat_interleave": -1, "reshape": -1, "unsqueeze": 2, "expand": 2, "flatten": 1,
    }  # fmt: skip
    for rows, frames in ((2, 3), (1, 5), (4, 2)):
        x, t = inputs(rows, frames, seed=rows)
        torch.testing.assert_close(run(gm, x, t), net(x, t), **ROUNDINGS)
    assert not sink_repeats(gm).modified
    assert set(find_temporal(gm).features) == {names["spatial.weight"], names["temporal.weight"]}


class Chain(nn.Module):
    """Repeats the timestep's embedding in one of several ways, and computes several things of it."""

    def __init__(self, how, steps):
        super().__init__()
        self.how, self.steps = how, steps
        self.time, self.norm, self.out = nn.Linear(1, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in steps)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x, timestep):
        n, frames = x.shape[0], x.shape[1]
        emb = self.time(timestep[:, None] / 500)
        h = {
            "rows": lambda: emb[:, None].expand(-1, frames, -1).flatten(0, 1),
            "interleave": lambda: torch.repeat_interleave(emb, frames, 0),
            "dimension": lambda: emb[:, None].expand(-1, frames, -1),
            "repeat": lambda: emb[:, None].repeat(1, frames, 1),
        }[self.how]()
        first = h
        for step, layer in zip(self.steps, self.layers, strict=True):
            if step == "layer":
                h = layer(F.silu(h))
            elif step == "norm":
                h = self.norm(h)
            elif step == "scale":
                h = h * self.scale + 1
            elif step == "sum":
                h = h + first.reshape(h.shape)
            elif step == "reshape":
                h = h.reshape(n, frames, 8) if h.dim() == 2 else h.reshape(-1, 8)
            elif step == "cast":
                h = h.double().float()
        return self.out(x + h.reshape(n, frames, 8))


STEPS = st.lists(
    st.sampled_from(["layer", "norm", "scale", "sum", "reshape", "cast"]), min_size=1, max_size=6
)


@settings(max_examples=12, deadline=None)
@given(how=st.sampled_from(["rows", "interleave", "dimension", "repeat"]), steps=STEPS)
@torch.no_grad()
def test_any_chain_computes_the_same(how, steps):
    torch.manual_seed(0)
    net = Chain(how, steps).eval()
    gm = exported(net, torch.randn(2, 3, 8), torch.tensor([3.0, 500.0]), frames=1)
    modified = sink_repeats(gm).modified
    assert modified == bool({"layer", "norm"} & {*steps})
    for rows, frames in ((2, 3), (3, 4)):
        x, t = torch.randn(rows, frames, 8), torch.arange(rows) * 300.0
        torch.testing.assert_close(run(gm, x, t), net(x, t), **ROUNDINGS)
    if modified:
        rows = [n for n in gm.graph.nodes if op_name(n) in ("linear", "layer_norm")][:-1]
        batch = str(meta_value(gm.graph.find_nodes(op="placeholder")[1]).shape[0])
        assert all(str(meta_value(n).shape[0]) == batch and meta_value(n).dim() == 2 for n in rows)
    assert not sink_repeats(gm).modified


class Written(Chain):
    """Changes what it has repeated in place."""

    def forward(self, x, timestep):
        h = self.time(timestep[:, None] / 500)[:, None].repeat(1, x.shape[1], 1)
        y = self.layers[0](h)
        h.mul_(2.0)
        return self.out(x + y + self.layers[1](h))


class Placed(Chain):
    """Adds another number to each of the equal rows."""

    def forward(self, x, timestep):
        h = self.time(timestep[:, None] / 500)[:, None].expand(-1, x.shape[1], -1)
        return self.out(x + self.layers[0](h + torch.arange(x.shape[1])[:, None]))


@pytest.mark.parametrize("cls", [Written, Placed])
@torch.no_grad()
def test_what_is_written_or_differs_from_row_to_row_stays(cls):
    net = cls("rows", ["layer", "layer"]).eval()
    gm = exported(net, torch.randn(2, 3, 8), torch.tensor([3.0, 500.0]), frames=1)
    assert not sink_repeats(gm).modified


def test_an_unknown_timestep_is_refused():
    with pytest.raises(TFMQError, match="timestep='sigma'"):
        sink_repeats(exported(network(), *inputs(2)), timestep="sigma")
