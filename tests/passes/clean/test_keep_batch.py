"""What a squeeze takes of a single row."""

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.utils import _pytree as pytree

from tfmq_fx.graph.nodes import fresh, op_name
from tfmq_fx.passes import keep_batch

X, T = torch.randn(3, 1, 4, 1, 5, 5), torch.rand(3)


class Squeezes(nn.Module):
    """One may take the batch alone, one the batch and two dimensions, one is of frames, one of a fixed dimension."""

    def forward(self, sample, timestep):
        t = timestep.squeeze(-1)[:, None, None, None]
        x = sample.squeeze()  # (N, 4, 5, 5)
        frames = x.transpose(0, 1).mean(0, keepdim=True).squeeze(0).squeeze(1)  # (N, 5, 5)
        y = sample.squeeze((0, 3)).squeeze(1)
        return x * t + y, frames, t.squeeze()


def graph(network=None):
    batch, size = {0: torch.export.Dim.AUTO}, torch.export.Dim.AUTO
    shapes = {"sample": {0: torch.export.Dim.AUTO, 4: size, 5: size}, "timestep": batch}
    program = torch.export.export(network or Squeezes(), (X, T), dynamic_shapes=shapes, strict=False)
    return program.module(check_guards=False)


def squeezes(gm):
    return [
        (str(n.target).removeprefix("aten."), *n.args[1:]) for n in gm.graph.nodes if op_name(n) == "squeeze"
    ]


def run(gm, *inputs):
    return pytree.tree_leaves(torch.fx.Interpreter(gm).run(*inputs))  # a module would check sizes


def test_what_may_take_the_batch_takes_the_dimensions_of_one():
    gm = graph()
    before = squeezes(gm)
    assert keep_batch(gm).modified
    assert before == [
        ("squeeze.dim", -1),
        ("squeeze.default",),
        ("squeeze.dim", 0),
        ("squeeze.dim", 1),
        ("squeeze.dims", [0, 3]),
        ("squeeze.dim", 1),
        ("squeeze.default",),
    ]
    assert squeezes(gm) == [
        ("squeeze.dims", [1, 3]),
        ("squeeze.dim", 0),  # the mean over channels
        ("squeeze.dim", 1),  # a height, which may be one
        ("squeeze.dim", 3),
        ("squeeze.dim", 1),
        ("squeeze.dims", [1, 2, 3]),
    ]


def test_the_values_are_bitwise_the_same_and_one_row_is_that_of_several():
    gm = graph()
    before = fresh(gm)
    keep_batch(gm)
    for a, b in zip(run(gm, X, T), run(before, X, T), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(IndexError):
        run(before, X[:1], T[:1])
    for i in range(3):
        for a, b in zip(run(gm, X[i : i + 1], T[i : i + 1]), run(gm, X, T), strict=True):
            assert torch.equal(a, b[i : i + 1])


def test_a_second_run_changes_nothing():
    gm = graph()
    keep_batch(gm)
    before = str(gm.graph)
    assert not keep_batch(gm).modified
    assert str(gm.graph) == before


def test_a_graph_without_shapes_is_left_and_so_is_a_squeeze_in_place():
    class InPlace(nn.Module):
        def forward(self, sample, timestep):
            return (timestep + 1).squeeze_()[:, None] * sample.flatten(1)

    assert not keep_batch(symbolic_trace(Squeezes())).modified
    gm = graph(InPlace())
    assert squeezes(gm) == [("squeeze_.default",)]
    assert not keep_batch(gm).modified
