"""All numbers of a timestep in one lookup."""

import torch
from torch import nn

from tests.helpers.int8_passes import operators
from tfmq_fx.passes import look_up_together


class Tables(nn.Module):
    """Vectors that are read at one index, at another, and a matrix."""

    def __init__(self, sizes=(5, 5, 5, 4)):
        super().__init__()
        for i, n in enumerate(sizes):
            self.register_buffer(f"t{i}", torch.rand(n))
        self.register_buffer("features", torch.rand(5, 3))

    def forward(self, i, j):
        a, b = self.t0[i], self.t1.index_select(0, i)
        c, d = self.t2.index_select(0, i), self.t3.index_select(0, j)
        return a.sum() + b * c.view(-1), d, self.features.index_select(0, i), self.t0.index_select(0, i)


def traced(*inputs):
    program = torch.export.export(Tables(), inputs, strict=False)
    return program.module()


@torch.no_grad()
def test_vectors_of_one_index_are_read_at_once():
    torch.manual_seed(0)
    inputs = (torch.tensor([4, 0, 2]), torch.tensor([1, 3, 3]))
    gm = traced(*inputs)
    expected, before = gm(*inputs), operators(gm).count("index_select")
    assert look_up_together(gm).modified
    torch.testing.assert_close(gm(*inputs), expected, rtol=0, atol=0)
    assert (
        operators(gm).count("index_select") == before - 2
    )  # three became one; the other length and the matrix stay
    assert not look_up_together(gm).modified


@torch.no_grad()
def test_entries_are_aligned_for_every_batch():
    gm = traced(torch.tensor([4, 0, 2]), torch.tensor([1, 3, 3]))
    look_up_together(gm)
    entry = next(
        n
        for n in gm.graph.nodes
        if n.target is torch.ops.aten.select.int and n.args[2] == 0 and n.args[0].args[2] == 1
    )
    seen = torch.fx.Interpreter(gm)
    run = seen.run_node
    found = {}

    def kept(n):
        found[n] = run(n)
        return found[n]

    seen.run_node = kept
    seen.run(torch.tensor([4, 0, 2]), torch.tensor([1, 3, 3]))
    assert found[entry].storage_offset() * 4 % 16 == 0
    assert found[entry].is_contiguous()
