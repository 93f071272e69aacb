"""Layers that read a timestep for each token get one row for each."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.helpers.tokens import FRAMES, TOKENS, Frames, Tiled, Tokens, inputs, network
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import meta_value, op_name, weight_path
from tfmq_fx.passes.temporal.flatten_entries import flatten_entries

BLOCK = ("time.0.weight", "time.2.weight", "proj.weight")
# A product of a matrix with fewer rows is summed in another order: some units in the last place.
ROUNDINGS = {"rtol": 1e-5, "atol": 1e-6}


def exported(net, shape):
    x, t = inputs(2, shape)
    dynamic = {n: {0: torch.export.Dim.AUTO} for n in ("x", "timestep")}
    given = {"x": x, "timestep": t}
    program = torch.export.export(net, (), given, dynamic_shapes=dynamic, strict=False)
    gm = program.module(check_guards=False)
    return torch.fx.GraphModule(gm, gm.graph)


def rows_of(gm):
    """The number of dimensions of every layer's output."""
    return {weight_path(n): meta_value(n).dim() for n in gm.graph.nodes if op_name(n) == "linear"}


@pytest.mark.parametrize("where", ["early", "before"])
@torch.no_grad()
def test_linears_of_the_block_read_rows(where):
    net = network(Tokens, where)
    gm = exported(net, (TOKENS,))
    before = rows_of(gm)
    assert set(before.values()) == {3}
    assert flatten_entries(gm, timestep="timestep").modified
    assert rows_of(gm) == {**before, **dict.fromkeys(BLOCK, 2)}
    assert not flatten_entries(gm, timestep="timestep").modified
    for rows in (1, 3):
        x, t = inputs(rows)
        (y,) = pytree.tree_leaves(torch.fx.Interpreter(gm).run(x, t))
        assert torch.equal(y, net(x, t))


@pytest.mark.parametrize(("cls", "shape"), [(Frames, (1, FRAMES, 1, 1)), (Tiled, (FRAMES,))])
@torch.no_grad()
def test_a_row_that_many_tokens_share_is_computed_once(cls, shape):
    net = network(cls)
    gm = exported(net, shape)
    assert flatten_entries(gm, timestep="timestep").modified
    (proj,) = (n for n in gm.graph.nodes if weight_path(n) == "proj.weight")
    for rows in (2, 5):
        x, t = inputs(rows, shape)
        run = torch.fx.Interpreter(gm, garbage_collect_values=False)
        (y,) = pytree.tree_leaves(run.run(x, t))
        assert run.env[proj].shape == (rows * FRAMES, 64)
        torch.testing.assert_close(y, net(x, t), **ROUNDINGS)
    assert not flatten_entries(gm, timestep="timestep").modified


def test_what_flattens_its_rows_itself_stays():
    gm = exported(network(Tokens, "late"), (TOKENS,))
    assert not flatten_entries(gm, timestep="timestep").modified


def test_an_unknown_timestep_is_refused():
    with pytest.raises(TFMQError, match="timestep='sigma'"):
        flatten_entries(exported(network(), (TOKENS,)), timestep="sigma")
