"""Tensors of one value while a network is traced: what is read of them, and what makes it forgotten."""

import pytest
import torch
from torch import nn

from tfmq_fx.base.filled import Filled
from tfmq_fx.base.tracing import symbolic_lengths


def read(m, x):
    """Return what a network may read of a mask m (1, N) and pick by it of x (1, N, C)."""
    padded = torch.nn.functional.pad(m.bool(), (1, 0), value=True)
    changed = m.clone()
    changed[0][0] = 0
    return [
        x[:, : m.sum(dim=1, dtype=torch.int)[0]], x[0][~m[0].bool()], x[m.bool()], x[0][m[0] != 0], x[:, (m == 0).any():],
        *[b[a.bool()] for a, b in zip(m, x, strict=True)], m.sum(1).tolist(), int((5 + m)[0, 0]), (m * 2 - 1).sum().item(),
        torch.nonzero(m.flatten(), as_tuple=False).flatten(), m[0].nonzero(as_tuple=True)[0], bool(torch.all(m == 0)),
        bool(padded.all()), bool((m.bool() & ~m.bool()).any()), changed.sum().item(), m.sum().item(),
    ]  # fmt: skip


@pytest.mark.parametrize("value", [1, 0, 1.0, True, 0.25])
def test_what_is_read_of_them_is_what_they_hold(value):
    x = torch.randn(1, 4, 3)
    m = torch.full((1, 4), value)
    if isinstance(value, float) and value not in (0, 1):
        m = m.double()
    expected = read(m, x)
    with Filled():
        known = torch.full((1, 4), value).to(m.dtype)
        found = read(known, x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def test_what_is_written_to_is_forgotten_with_all_that_shares_its_memory():
    with Filled() as mode:
        x = torch.ones(2, 4)
        view, copy, other = x[0], x.clone(), x + 1
        assert all(y in mode for y in (x, view, copy, other))
        view.mul_(3)
        assert [y in mode for y in (x, view, copy, other)] == [False, False, True, True]
        torch.zeros(2, 4, out=copy)
        assert copy not in mode
        assert torch.rand(2) not in mode
        # 257 is no number in bfloat16: what such a sum would be rounded to is not known.
        assert torch.ones(257, dtype=torch.bfloat16).sum() not in mode


class Sums(nn.Module):
    def forward(self, x):
        lengths = torch.ones(x.shape[:2]).sum(dim=1).long().tolist()
        if len(set(lengths)) == 1 and len({1, 2}) == 2:
            x = x * 2
        return x[:, : max(lengths)]


def test_sizes_that_are_read_of_them_stay_open():
    given = {"x": torch.randn(1, 4, 3)}
    with symbolic_lengths(Sums(), sets=True), Filled():
        program = torch.export.export(
            Sums(), (), given, dynamic_shapes={"x": {1: torch.export.Dim.AUTO}}, strict=False
        )
    longer = torch.randn(1, 9, 3)
    assert torch.equal(program.module()(x=longer), 2 * longer)


class Differs(nn.Module):
    def forward(self, a, b):
        return a[:1] * len(set([a.shape[0], b.shape[0], a.shape[0], 3]))  # noqa: C405


def test_a_set_of_sizes_has_those_that_differ():
    given = {"a": torch.randn(4), "b": torch.randn(6)}
    sizes = {n: {0: torch.export.Dim.AUTO} for n in given}
    with symbolic_lengths(Differs(), sets=True), Filled():
        program = torch.export.export(Differs(), (), given, dynamic_shapes=sizes, strict=False)
    assert torch.equal(program.module()(**given), given["a"][:1] * 3)
    with pytest.raises(Exception, match="Guard"):
        program.module()(a=torch.randn(6), b=torch.randn(6))
    assert "set" not in vars(__import__(Differs.__module__, fromlist=["x"]))


class Sized(nn.Module):
    """Reads the height and width of each picture of a table of them, as numbers."""

    def forward(self, x):
        height, width = x.shape[1:3]
        table = torch.tensor([height // 2, width // 2], dtype=torch.int64, device=x.device).reshape(-1)
        made, flat = [], x.flatten(1, 2)
        for i, size in enumerate(table.unsqueeze(0).repeat(x.shape[0], 1)):
            rows, columns = size
            made.append(flat[i, : rows * columns].reshape(1, rows, columns, -1))
        return torch.cat(made)


def test_sizes_that_are_read_of_a_small_table_stay_open():
    size = {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    with Filled():
        program = torch.export.export(
            Sized(), (), {"x": torch.randn(1, 8, 6, 3)}, dynamic_shapes={"x": size}, strict=False
        )
    other = torch.randn(1, 6, 10, 3)
    found = program.module()(x=other)
    assert found.shape == (1, 3, 5, 3)
    assert torch.equal(found, Sized()(other))


def test_a_small_table_is_known_by_what_moves_it_and_forgotten_when_written():
    with Filled() as mode:
        table = torch.tensor([[3, 4], [5, 6]])
        assert table.t()[0].tolist() == [3, 5]
        assert int(table[1, 0]) == 5
        first, second = table.long().clone().unbind()
        assert (first[1] + second[0]) in mode
        assert [int(a * b) for a, b in table] == [12, 30]
        view, copy = table[0], table.clone()
        table.mul_(2)
        assert view.tolist() == [6, 8]
        assert copy[0].tolist() == [3, 4]
        assert torch.tensor([0.5, 1.5])[0] not in mode
        assert torch.tensor(data=[7, 8])[0].item() == 7
        assert torch.stack(tensors=[torch.tensor(1), torch.tensor(2)]).tolist() == [1, 2]
        assert torch.arange(1000).reshape(2, -1)[0] not in mode
        assert table[torch.tensor([1])].tolist() == [[10, 12]]
