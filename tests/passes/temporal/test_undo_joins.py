"""Pieces of joins are what was joined, where they are the same."""

import torch
from torch import nn

import tfmq_fx
from tests.helpers.blocks import layer_paths
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import find_temporal, undo_joins

X, T = torch.randn(2, 4), torch.tensor([1, 2])


class Joins(nn.Module):
    """Takes joins apart: as they were joined, one in another, elsewhere, of another dtype, and along other dimensions."""

    def forward(self, x, y):
        whole = torch.cat([torch.cat([x, y], 1), x.double()], -1)
        a, b, c = whole.chunk(3, 1)
        d, e = torch.cat([x, y], 1).split([3, 5], 1)
        f, g = torch.cat([x, y], 1).chunk(2)
        h, i = torch.cat([x, y]).split(2)
        j, k = torch.cat([h, i], 1).split([4, 4], -1)
        return a, b, c, d, e, f, g, h, i, j, k


def exported():
    return torch.export.export(Joins(), (X, X + 1), strict=False).module(check_guards=False)


def test_only_whole_tensors_are_replaced():
    gm = exported()
    assert undo_joins(gm).modified
    x, y = gm.graph.find_nodes(op="placeholder")
    made = torch.utils._pytree.tree_leaves(gm.graph.output_node().args)
    # The first two are double in the join, the next two other pieces, and the next two of another dimension.
    assert [op_name(n) for n in made[:7]] == ["getitem", "getitem", "to", *["getitem"] * 4]
    assert made[7:] == [x, y, x, y]
    for a, b in zip(gm(X, X + 1), Joins()(X, X + 1), strict=True):
        assert torch.equal(a, b)


def test_a_second_run_changes_nothing_nor_does_one_without_shapes():
    gm = exported()
    undo_joins(gm)
    assert not undo_joins(gm).modified
    gm = exported()
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    assert not undo_joins(gm).modified


class Writes(nn.Module):
    """Changes a piece in place, which leaves what was joined as it is."""

    def forward(self, x, y):
        piece, _ = torch.cat([x, y], 1).chunk(2, 1)
        piece.add_(1)
        return piece + x


def test_pieces_that_are_written_to_stay():
    gm = torch.export.export(Writes(), (X, X + 1), strict=False).module(check_guards=False)
    assert not undo_joins(gm).modified
    assert torch.equal(gm(X, X + 1), Writes()(X, X + 1))


class Packed(nn.Module):
    """Passes the embeddings of the timestep and of another number, which is always 0, on as one tensor."""

    def __init__(self):
        super().__init__()
        self.time, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def embedded(self, t):
        angle = t[:, None] * torch.tensor([1.0, 0.1])
        return torch.cat([angle.sin(), angle.cos()], 1)

    def forward(self, sample, timestep):
        packed = torch.cat([self.embedded(timestep.float()), self.embedded(torch.zeros_like(timestep))], 1)
        time, other = packed.chunk(2, 1)
        return sample * (1 + self.time(time) + self.other(other))


def test_what_is_computed_beside_the_timestep_is_no_part_of_its_block():
    network = Packed().eval()
    gm = tfmq_fx.capture(network, {"sample": X, "timestep": T})
    temporal = find_temporal(gm)
    assert layer_paths(gm, temporal.features) == layer_paths(gm, temporal.nodes) == {"time"}
    sample, timestep = torch.randn(5, 4), torch.arange(5)
    with torch.no_grad():
        assert torch.equal(gm(sample, timestep), network(sample, timestep))
