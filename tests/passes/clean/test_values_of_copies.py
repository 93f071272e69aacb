"""Writes in their functional form: what is copied, in the shape and dtype of the place."""

import torch
from torch import nn

from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import values_of_copies


class Writes(nn.Module):
    """Writes a tensor of another dtype, a row for all rows, and a number."""

    def forward(self, x, y):
        place = x.new_zeros(x.shape[0] + 2, 4)
        place[1 : x.shape[0] + 1] = y
        place[: x.shape[0], 1:] = x[0, 1:]
        place[0] = 3
        return place


def exported():
    given = torch.randn(3, 4), torch.arange(12).view(3, 4)
    sizes = {0: torch.export.Dim.AUTO}
    program = torch.export.export(Writes(), given, dynamic_shapes=(sizes, sizes), strict=False)
    return program.run_decompositions({}).module(check_guards=False)


def test_nothing_is_read_of_the_place():
    gm = exported()
    assert "copy" in {op_name(n) for n in gm.graph.nodes}
    assert values_of_copies(gm).modified
    assert "copy" not in {op_name(n) for n in gm.graph.nodes}
    x, y = torch.randn(5, 4), torch.arange(20).view(5, 4)
    assert torch.equal(gm(x, y), Writes()(x, y))
    assert not values_of_copies(gm).modified


def test_values_have_a_derivative_then():
    gm = exported()
    values_of_copies(gm)
    x = torch.randn(3, 4, requires_grad=True)
    gm(x, torch.arange(12).view(3, 4)).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 2, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]))
