"""A branch of low rank beside a layer."""

import pytest
import torch
from torch import nn

from benchmarks.networks.small import prepared
from tests.helpers.low_bits import Shared, done, edges, graph, operators, run
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import attribute, fresh
from tfmq_fx.graph.state import captured_of
from tfmq_fx.passes import find_temporal, low_rank
from tfmq_fx.passes.low_bits.low_rank import _rounding_error


def split(gm, image=False, **changes):
    """A copy with branches, checked for what holds of each: same function, same block, the original as it was."""
    before = {n: p.clone() for n, p in gm.named_parameters()}
    expected = run(gm, image)
    got = low_rank(fresh(gm), **{"rank": 1, **changes}).graph_module
    torch.testing.assert_close(run(got, image), expected)
    assert find_temporal(got) == find_temporal(gm)
    assert edges(got) == edges(gm)
    assert all(torch.equal(p, before[n]) for n, p in gm.named_parameters())
    return got


def linears():
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))


def test_a_branch_stands_beside_its_layer_in_half_precision():
    gm = graph(linears)
    w = attribute(gm, "body.0.weight").detach().clone()
    got = split(gm, rank=2)
    branch = ["linear", "to", "to", "linear", "linear", "add"]
    assert operators(got) == [*branch, "silu", *branch, "linear"]
    l1, l2 = (attribute(got, f"body.0.weight_low_rank_{i}") for i in (1, 2))
    assert (l1.dtype, l1.shape, l2.dtype, l2.shape) == (torch.float16, (16, 2), torch.float16, (2, 8))
    rest = attribute(got, "body.0.weight").detach()
    torch.testing.assert_close(rest + l1.float() @ l2.float(), w)
    s = torch.linalg.svdvals(w)
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:6], s[2:], rtol=1e-2, atol=1e-3)


def test_a_convolutions_branch_has_its_stride_padding_and_dilation():

    def body():
        return nn.Sequential(
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, (3, 1), padding="same", dilation=(2, 1), bias=False),
        )

    got = split(graph(body, image=True), image=True, rank=2)
    assert attribute(got, "body.1.weight_low_rank_2").shape == (2, 8, 3, 1)
    assert attribute(got, "body.1.weight_low_rank_1").shape == (8, 2, 1, 1)


def test_of_weight_and_error_the_better_one_is_taken():
    gm = graph(linears)
    left = {}
    for bits in (None, 2, 8):
        got = split(gm, rank=1, bits=bits)
        rest = attribute(got, "body.2.weight").detach().double()
        left[bits] = [_rounding_error(rest, b).norm().item() for b in (2, 8)]
    assert left[2][0] <= left[None][0]
    assert left[8][1] <= left[None][1]


def test_what_has_no_branch_is_left_and_says_why():

    def body():
        return nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 1))

    got = split(graph(body, image=True), image=True, rank=4)
    assert set(done(got, "low_rank").values()) == {"left"}
    assert [c.reason for c in captured_of(got).low_bits["low_rank"] if c.reason != "first or last layer"] == [
        "a grouped conv2d has no branch of this form",
        "a conv_transpose2d has no branch of this form",
        "a branch of rank 4 would hold 64 numbers, the weight has 64",
    ]
    assert [c.how for c in captured_of(split(graph(Shared))).low_bits["low_rank"] if "own" in c.reason] == [
        "left",
        "left",
    ]


def test_a_second_time_changes_nothing():
    got = split(graph(linears))
    nodes = [n.format_node() for n in got.graph.nodes]
    assert not low_rank(got, rank=3).modified
    assert [n.format_node() for n in got.graph.nodes] == nodes


def test_ranks_and_graphs_that_make_no_sense_are_refused():
    with pytest.raises(TFMQError, match="rank=0: is not positive"):
        low_rank(graph(linears), rank=0)
    with pytest.raises(TFMQError, match="low_rank: the graph is calibrated already"):
        low_rank(prepared())
