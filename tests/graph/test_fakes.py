"""Shapes for a batch of any size, without torch.export."""

import torch
from torch import nn

from benchmarks.networks.small import TinyUNet, captured
from tfmq_fx.graph.fakes import fill_fake_values, set_fake_values
from tfmq_fx.graph.nodes import fixed_size, fresh, meta_value


def test_shapes_and_dtypes_are_those_of_the_capture():
    gm = captured(TinyUNet)
    again = fresh(gm)
    for node in again.graph.nodes:
        node.meta.pop("val", None)
    set_fake_values(
        again,
        {"sample": torch.zeros(2, 1, 8, 8), "timestep": torch.zeros(2, dtype=torch.int64)},
        dynamic={"sample": {0, 2, 3}, "timestep": {0}},
        apart={("sample", 2), ("sample", 3)},
    )
    for old, new in zip(gm.graph.nodes, again.graph.nodes, strict=True):
        x, y = meta_value(old), meta_value(new)
        if isinstance(x, torch.Tensor) and old.op != "output":
            assert x.dtype == y.dtype == new.meta["tensor_meta"].dtype
            assert [fixed_size(d) for d in x.shape] == [fixed_size(d) for d in y.shape], old


def test_a_size_that_the_graph_computes_has_a_value_of_its_own():
    class Heads(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] * 2, 3)

    with torch.no_grad():
        gm = torch.export.export(
            Heads(), (torch.zeros(2, 6),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        ).module(check_guards=False)
    gm = fresh(gm)
    set_fake_values(gm, {"x": torch.zeros(2, 6)}, dynamic={"x": {0}})
    (reshape,) = [n for n in gm.graph.nodes if "reshape" in str(n.target)]
    rows = meta_value(reshape).shape[0]
    assert fixed_size(rows) is None
    assert rows.node.hint == 4


def test_only_what_has_no_value_gets_one():
    gm = fresh(captured(TinyUNet))
    kept = {n: meta_value(n) for n in gm.graph.nodes}
    lost = [n for n in gm.graph.nodes if n.op in ("get_attr", "call_function")][::2]
    for node in lost:
        del node.meta["val"]
    fill_fake_values(gm)
    for node, old in kept.items():
        new = meta_value(node)
        if node not in lost:
            assert new is old
        elif isinstance(old, torch.Tensor):
            assert (new.dtype, new.device) == (old.dtype, old.device)
            assert [fixed_size(d) for d in new.shape] == [fixed_size(d) for d in old.shape]
