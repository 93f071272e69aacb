"""Each rule of the taint on the smallest network that shows it: which inputs' values reach a node."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import sinusoid
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.written import writing_nodes
from tfmq_fx.passes import find_temporal, partition_temporal
from tfmq_fx.passes.temporal.find_temporal import taint

X, T = torch.randn(2, 4, 3), torch.tensor([3, 500])


class Net(nn.Module):
    """`rule(self, sample, timestep, **more)` between a time layer and a data layer."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.time, self.body, self.label = nn.Linear(8, 3), nn.Linear(3, 3), nn.Embedding(10, 8)
        self.more = nn.Linear(8, 8)
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, sample, timestep, label=None, pooled=None, guidance=None, ids=None):
        more = {"label": label, "pooled": pooled, "guidance": guidance, "ids": ids}
        return self.rule(self, sample, timestep, **{k: v for k, v in more.items() if v is not None})


def graph(rule, **more):
    return tfmq_fx.capture(Net(rule).eval(), {"sample": X, "timestep": T, **more}, timestep="timestep")


def reach(gm, path):
    """The inputs whose values reach the output of the layer with that weight."""
    marks = taint(gm)
    (layer,) = [
        n
        for n in gm.graph.nodes
        if n.op == "call_function" and any(i.target == f"{path}.weight" for i in n.all_input_nodes)
    ]
    return marks[layer]


def time(net, t):
    return net.time(sinusoid(t, 8))[:, None]


# Each of these leaves `time` a function of the timestep alone.
PURE = {
    "the sample's shape": lambda net, x, t: (
        net.body(x) + time(net, t) * x.shape[2] + torch.ones(x.shape[0], 1, 1)
    ),
    "the sample's dtype": lambda net, x, t: net.body(x) + net.time(sinusoid(t, 8).to(x.dtype))[:, None],
    "the sample's device": lambda net, x, t: net.body(x) + net.time(sinusoid(t.to(x.device), 8))[:, None],
    "type_as": lambda net, x, t: net.body(x) + net.time(sinusoid(t.type_as(x), 8))[:, None],
    "ones_like": lambda net, x, t: net.body(x) + time(net, t * torch.ones_like(x[:, 0, 0])),
    "new_zeros": lambda net, x, t: net.body(x) + time(net, t + x.new_zeros(x.shape[0])),
    "expand_as": lambda net, x, t: net.body(x) + net.time(sinusoid(t, 8))[:, None].expand_as(x),
    "broadcast by expand": lambda net, x, t: net.body(x) + time(net, t[:1].expand(x.shape[0])),
    "broadcast by repeat": lambda net, x, t: net.body(x) + time(net, t[:1].repeat(x.shape[0])),
    "broadcast by ones": lambda net, x, t: net.body(x) + time(net, t[:1] * torch.ones(x.shape[0])),
    "buffers": lambda net, x, t: net.body(x) + net.time(sinusoid(t, 8) * net.table)[:, None],
    "constants": lambda net, x, t: net.body(x) + net.time(sinusoid(t, 8) + torch.arange(8.0))[:, None],
    "parameters": lambda net, x, t: net.body(x) + net.time(sinusoid(t, 8) * net.more.bias)[:, None],
    "detach": lambda net, x, t: net.body(x) + time(net, t).detach(),
    "casts": lambda net, x, t: net.body(x) + net.time(sinusoid(t, 8).double().float())[:, None],
    "views": lambda net, x, t: net.body(x) + net.time(sinusoid(t, 8).view(-1, 2, 4).flatten(1))[:, None],
    "cat": lambda net, x, t: (
        net.body(x) + net.time(torch.cat([sinusoid(t, 4), sinusoid(t + 1, 4)], 1))[:, None]
    ),
    "chunk": lambda net, x, t: net.body(x) + sum(net.time(sinusoid(t, 8)).repeat(1, 2).chunk(2, 1))[:, None],
    "t used twice": lambda net, x, t: net.body(x) * t[:, None, None] + time(net, t),
    "t in a data branch too": lambda net, x, t: net.body(x * t[:, None, None]) + time(net, t),
    "a scratch buffer": lambda net, x, t: (
        net.body(x) + net.time(torch.zeros(x.shape[0], 8).copy_(sinusoid(t, 8)))[:, None]
    ),
}


@pytest.mark.parametrize("rule", PURE.values(), ids=PURE.keys())
def test_a_function_of_the_timestep_alone(rule):
    gm = graph(rule)
    assert reach(gm, "time") == {"timestep"}
    temporal = find_temporal(gm)
    assert temporal.keys == ("timestep",)
    (feature,) = [
        n
        for n in gm.graph.nodes
        if n.name in temporal.features
        and n.op != "placeholder"
        and any(i.target == "time.weight" for i in n.all_input_nodes)
    ]
    assert feature.name in temporal.features
    assert "sample" in reach(gm, "body")


def mixed(extra):
    return lambda net, x, t, **more: (
        net.body(x) + net.time(F.silu(sinusoid(t, 8) + extra(net, **more)))[:, None]
    )


MIXED = {
    "label": (mixed(lambda net, label: net.label(label)), torch.tensor([1, 2])),
    "pooled": (mixed(lambda net, pooled: net.more(pooled)), torch.randn(2, 8)),
    "guidance": (mixed(lambda net, guidance: net.more(sinusoid(guidance, 8))), torch.tensor([3.5, 4.0])),
    "ids": (
        mixed(lambda net, ids: net.more(sinusoid(ids.flatten(), 4).reshape(-1, 8))),
        torch.tensor([[8, 8], [4, 4]]),
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_mixed_value_is_classified_by_what_reaches_it(name):
    rule, value = MIXED[name]
    gm = graph(rule, **{name: value})
    assert reach(gm, "time") == {"timestep", name}
    temporal = find_temporal(gm)
    assert temporal.keys == ("timestep", name)
    assert temporal.feature_keys == (("timestep", name),)
    # Told that only the timestep counts, the block ends where the other value joins: nothing weighted is left.
    alone = find_temporal(gm, conditioning=())
    assert alone.keys == ("timestep",)
    assert not set(alone.nodes) & set(temporal.features)


def test_a_sequence_is_data_and_not_conditioning():
    gm = graph(mixed(lambda net, pooled: net.more(pooled).mean(1)), pooled=torch.randn(2, 5, 8))
    assert reach(gm, "time") == {"timestep", "pooled"}
    assert find_temporal(gm).keys == ("timestep",)


def test_conditioning_that_never_meets_the_timestep_stays_outside():
    gm = graph(
        lambda net, x, t, label: net.body(x + net.label(label)[:, None, :3]) + time(net, t), label=T % 10
    )
    temporal = find_temporal(gm)
    assert temporal.keys == ("timestep",)
    assert not any("label" in name for name in temporal.nodes)


def test_random_numbers_are_data():
    gm = graph(lambda net, x, t: net.body(x) + net.time(sinusoid(t, 8) + torch.randn(x.shape[0], 8))[:, None])
    assert any(mark.startswith("random") for mark in reach(gm, "time"))
    assert find_temporal(gm).keys == ("timestep",)


def in_place(net, x, t):
    buffer = torch.zeros(x.shape[0], 8)
    view = buffer[:, :4]
    buffer.add_(x.mean((1, 2))[:, None])  # taints `view` too
    return net.body(x) + net.time(torch.cat([sinusoid(t, 4), view], 1))[:, None]


def in_place_of_time(net, x, t):
    emb = sinusoid(t, 8)
    emb[:, 0] = 1.0
    emb.mul_(2).add_(net.table)
    return net.body(x) + net.time(emb)[:, None]


def after_the_write(net, x, t):
    buffer = sinusoid(t, 8)
    early = net.time(buffer)[:, None]  # read before the write: still of the timestep alone
    buffer.add_(x.mean((1, 2))[:, None])
    return net.body(x) + early + net.more(buffer).mean(1)[:, None, None]


def exported(rule):
    """A graph as torch.export leaves it: with writes."""
    with torch.no_grad():
        gm = torch.export.export(Net(rule).eval(), (X, T), strict=False).module(check_guards=False)
    gm.graph.set_codegen(torch.fx.graph.CodeGen())
    output = gm.graph.output_node()
    output.args = (output.args[0][0],)
    return torch.fx.GraphModule(gm, gm.graph)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    ("rule", "expected"),
    [(in_place, {"timestep", "sample"}), (in_place_of_time, {"timestep"}), (after_the_write, {"timestep"})],
)
def test_writes_in_place_before_and_after_functionalisation(rule, expected, functional):
    gm = graph(rule) if functional else exported(rule)
    assert bool(writing_nodes(gm)) != functional  # `capture` leaves none
    assert reach(gm, "time") == expected


def test_a_write_after_an_outside_read_is_refused_by_the_partition():
    def read_then_write(net, x, t):
        emb = sinusoid(t, 8)
        y = net.body(x) * emb[:, :1, None]
        emb.mul_(2)
        return y + net.time(emb)[:, None]

    gm = exported(read_then_write)
    with pytest.raises(
        TFMQError,
        match=r"node mul_\w*: the temporal block writes in place to memory that node \w+ outside it reads",
    ):
        partition_temporal(gm)

    def write_then_read(net, x, t):
        emb = sinusoid(t, 8)
        emb.mul_(2)
        return net.body(x) * emb[:, :1, None] + net.time(emb)[:, None]

    for rule in (in_place_of_time, write_then_read):
        fine = exported(rule)
        with torch.no_grad():
            expected = fine(X, T)
            partition_temporal(fine)
            assert torch.equal(fine(X, T), expected)
