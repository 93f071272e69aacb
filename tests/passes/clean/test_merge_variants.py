"""Runs of several kinds of calls, in one graph that has what they share once."""

from collections import Counter

import torch
from torch import nn

from tfmq_fx.calibration.variants import Variants
from tfmq_fx.capturing.network import capture
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fresh, op_name
from tfmq_fx.passes import merge_variants


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.a, self.b, self.c = (nn.Linear(i, 4) for i in (1, 4, 4, 4))

    def forward(self, sample, timestep, kind="both"):
        """Take one of two layers, or both in turn, between two others; rows and frames are one dimension inside."""
        x = self.a(sample.flatten(0, 1)) + self.time(timestep[:, None].float()).repeat_interleave(3, 0)
        if kind in ("both", "b"):
            x = self.b(x).sin()
        if kind == "table":
            x = x + torch.arange(4.0)
        return self.c(x).unflatten(0, sample.shape[:2])


def captured(*kinds):
    """Return the network, and the graph of a call's rows of all kinds."""
    torch.manual_seed(0)
    network = Block().eval()
    others = [{"kind": k} for k in kinds]
    view = Variants(others, {"kind": ("kind",)}).row_wise(network)
    example = {
        "sample": torch.randn(2, 3, 4),
        "timestep": torch.tensor([3, 500]),
        "variant_rows": torch.tensor([0, 1]),
    }
    return network, capture(view, example)


def counts(gm):
    found = Counter(op_name(n) for n in gm.graph.nodes if n.op == "call_function")
    return {n: found[n] for n in ("linear", "where", "sin")}


def test_a_kind_that_skips_a_layer_adds_one_choice():
    network, gm = captured("none")
    assert counts(gm) == {"linear": 4, "where": 1, "sin": 1}
    x, t, kinds = torch.randn(5, 3, 4), torch.arange(5) * 100, torch.tensor([1, 0, 1, 0, 0])
    expected = torch.where(kinds[:, None, None] == 1, network(x, t, "none"), network(x, t))
    assert torch.equal(gm(x, t, kinds), expected)


def test_kinds_with_operators_of_their_own_have_them_beside_what_is_shared():
    network, gm = captured("table", "none")
    assert counts(gm) == {"linear": 4, "where": 2, "sin": 1}
    x, t, kinds = torch.randn(6, 3, 4), torch.arange(6) * 100, torch.tensor([0, 1, 2, 2, 1, 0])
    rows = [network(x, t, k) for k in ("both", "table", "none")]
    assert torch.equal(gm(x, t, kinds), torch.stack([rows[k][i] for i, k in enumerate(kinds)]))


def test_a_merged_graph_and_one_without_kinds_stay_as_they_are():
    _, gm = captured("none")
    before = str(gm.graph)
    merge_variants(gm, kinds="variant_rows")
    assert str(gm.graph) == before
    plain = capture(Block().eval(), {"sample": torch.randn(2, 3, 4), "timestep": torch.tensor([3, 500])})
    assert not merge_variants(fresh(plain), kinds="variant_rows").modified


class Tables(nn.Module):
    """The kind picks one of two tables, which have no rows."""

    def __init__(self):
        super().__init__()
        self.time, self.layer, self.tables = nn.Linear(1, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, sample, timestep, table=0):
        return self.layer((sample + self.time(timestep[:, None].float())) * self.tables[table].exp())


def test_what_has_no_rows_is_computed_for_each_kind():
    network = Tables().eval()
    view = Variants([{"table": 1}], {"table": ("table",)}).row_wise(network)
    example = {
        "sample": torch.randn(2, 4),
        "timestep": torch.tensor([3, 500]),
        "variant_rows": torch.tensor([0, 1]),
    }
    gm = capture(view, example)
    assert counts(gm) == {"linear": 2, "where": 1, "sin": 0}  # the product is chosen, after both tables' own
    assert op_name(next(n for n in gm.graph.nodes if op_name(n) == "where").args[1]) == "mul"
    x, t, kinds = torch.randn(3, 4), torch.arange(3) * 100, torch.tensor([1, 0, 1])
    expected = torch.where(kinds[:, None] == 1, network(x, t, 1), network(x, t))
    assert torch.equal(gm(x, t, kinds), expected)
    assert "variant_rows" in placeholders(gm)
