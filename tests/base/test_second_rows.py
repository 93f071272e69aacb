"""Arguments whose rows are their second dimension: told by calling the network, and given with rows first inside."""

import pytest
import torch
from torch import nn

from benchmarks.networks.small import Experts, experts, make
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.masked_rows import lists_of_json
from tfmq_fx.base.row_lists import known_lists
from tfmq_fx.base.second_rows import SecondRows, rows_of_call, second_rows


@pytest.mark.parametrize("rows", [1, 2, 3, 5])  # there are three layers
def test_they_are_told_by_a_row_more(rows):
    assert second_rows(make(Experts), experts(rows), "timestep") == SecondRows(("layers",), ())


class Mixed(nn.Module):
    """(K, N, D) whose entries all rows read, beside one of rows."""

    def forward(self, x, timestep, table):
        return x * timestep[:, None] + table.sum()


def test_other_arguments_are_left():
    given = {"x": torch.randn(3, 4), "timestep": torch.tensor([1.0, 2, 3]), "table": torch.randn(2, 3, 4)}
    assert rows_of_call(Mixed(), given, "timestep") is None
    given = experts(3)
    given["layers"] = torch.randn(2, 4, 5, 6)
    assert rows_of_call(make(Experts), given, "timestep") is None


def test_the_network_with_rows_first_computes_the_same():
    network, given = make(Experts), experts(4)
    found = rows_of_call(network, given, "timestep")
    view, taken = found.batched(network), found.taken(given)
    assert taken["layers"].shape[:2] == (4, 3)
    with torch.no_grad():
        expected = network(**given)
        assert torch.equal(view(**taken), expected)
        assert torch.equal(view(taken["x"], taken["timestep"], taken["layers"]), expected)
        assert torch.equal(found.by_shape(view, given), expected)
    assert known_lists(view) == found
    assert rows_of_call(view, taken, "timestep") is found
    assert all(map(torch.equal, found.listed(taken).values(), given.values()))
    assert found.groups(given) == [[0, 1, 2, 3]]
    assert lists_of_json(found.to_json()) == found
    with pytest.raises(TFMQError, match=r"'layers' is \(5,\), but must be a tensor \(K, N, ...\)"):
        found.by_shape(view, {**given, "layers": torch.ones(5)})
