"""Complex numbers as their parts: the same values, no complex tensor, and what stays complex."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.int8_passes import exported_batch, operators
from tfmq_fx.passes import complex_as_real

TABLE = torch.polar(torch.rand(9, 3) + 0.5, torch.randn(9, 3))


class Complex(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute, self.table = compute, nn.Buffer(TABLE)

    def forward(self, *inputs):
        return self.compute(*inputs, self.table)


def rotary(x, table):
    pairs = torch.view_as_complex(x.unflatten(-1, (2, 3, 2)))
    return torch.view_as_real(pairs * table[:2]).flatten(1)


def looked_up(x, table):
    """As Z-Image does: rows by position, padded, cut and joined."""
    rows = torch.cat([table[torch.tensor([3, 1])], table[4:5].flip(0)])
    padded = nn.utils.rnn.pad_sequence([rows, rows[:2]], batch_first=True, padding_value=0.0)
    return torch.view_as_real(padded[:1] * torch.view_as_complex(x.unflatten(-1, (1, 3, 2)))).flatten(1)


def parts(x, table):
    z = torch.complex(x[:, :3], x[:, 3:]) + table[0] - table[1].conj() * 0.5
    turned = torch.polar(x[:, :3].abs(), x[:, 3:]) * x[:, :1]
    return torch.cat([z.real, z.imag, z.abs(), turned.angle(), (z + x[:, :3] - 1.5).real], -1)


def created(x, table):
    full = torch.full((2, 3), 0.25, dtype=torch.complex64).select_scatter(table[0], 0, 1)
    return torch.view_as_real(full.to(torch.complex128)).flatten() + x[:, :1]


def split(x, table):
    a, b = table.split([1, 2], dim=-1)
    return torch.view_as_real(torch.cat([b, a], -1)).sum((0, 1)) * x[:, :2]


@pytest.mark.parametrize("compute", [rotary, looked_up, parts, created, split])
@torch.no_grad()
def test_it_gives_the_same_values(compute):
    x = torch.randn(4, 12 if compute is rotary else 6, generator=torch.Generator().manual_seed(0))
    gm = exported_batch(Complex(compute), x[:2])
    expected = gm(x)
    assert complex_as_real(gm).modified
    values = [v for n in gm.graph.nodes for v in [n.meta.get("val")] if isinstance(v, Tensor)]
    assert not any(v.is_complex() for v in values)
    torch.testing.assert_close(gm(x), expected)
    assert not complex_as_real(gm).modified


@torch.no_grad()
def test_the_operators_of_a_rotary_embedding():
    gm = exported_batch(Complex(rotary), torch.randn(2, 12))
    complex_as_real(gm)
    found = [op for op in operators(gm) if op in ("select", "mul", "sub", "add", "stack")]
    assert found == ["select", "select", "mul", "mul", "sub", "mul", "mul", "add", "stack"]
    assert {n for n, b in gm.named_buffers() if n.endswith(("_real", "_imaginary"))} == {
        "table_real",
        "table_imaginary",
    }


def spectrum(x, table):
    return torch.fft.ifft(torch.fft.fft(x[:, :3]) * table[0]).real


def number(x, table):
    return (x[:, :3] * 1j * table[0]).real


def returned(x, table):
    return x[:, :3] * table[0]


def mixed(x, table):
    return torch.cat([table[:1], x[:1, :3]]).real


@pytest.mark.parametrize("compute", [spectrum, number, returned, mixed])
@torch.no_grad()
def test_what_it_does_not_know_stays_complex_as_a_whole(compute):
    x = torch.randn(2, 6)
    gm = exported_batch(Complex(compute), x)
    before = operators(gm)
    assert not complex_as_real(gm).modified
    assert operators(gm) == before
