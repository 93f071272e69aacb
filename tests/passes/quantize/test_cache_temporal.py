"""Temporal features as tables."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, Labelled, TinyUNet, make, sinusoid
from tests.helpers.maintenance import BATCH, Divided, Nested, features, prepared
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.metrics import cosine_distance
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.maintenance.tables import feature_tables
from tfmq_fx.passes import cache_temporal
from tfmq_fx.passes.quantize.cache_temporal import decode, encode
from tfmq_fx.passes.quantize.state import state_of

# Half a unit in the last place, relative to the value: float16 has 11 bits of mantissa, bfloat16 8.
HALF_ULP = {"float16": 2**-11, "bfloat16": 2**-8}


def test_the_block_becomes_one_look_up():
    gm = prepared()
    assert cache_temporal(gm, tables=feature_tables(gm)).modified
    block = tfmq_fx.convert(gm).get_submodule("temporal_block")
    assert [op_name(n) or n.op for n in block.graph.nodes if n.op != "get_attr"] == [
        "placeholder", "to", "reshape", "sub", "abs", "argmin",
        "index_select", "_to_copy", "slice", "slice", "output",
    ]  # fmt: skip
    assert set(tensors_of(block)) == {"timestep_table", "temporal_cache.timestep.values"}


@pytest.mark.parametrize("cache_type", ["float16", "bfloat16"])
def test_a_cached_feature_is_its_float_value_rounded(cache_type):
    gm = prepared()
    tables = feature_tables(gm)
    cache_temporal(gm, tables=tables, cache_type=cache_type)
    rows = torch.tensor([3, 0, 9, 3])
    got = features(tfmq_fx.convert(gm), timestep=TIMESTEPS[rows])
    for value, table in zip(got, tables.values(), strict=True):
        assert torch.equal(value, table[rows].to(getattr(torch, cache_type)).float())
        assert ((value - table[rows]).abs() <= HALF_ULP[cache_type] * table[rows].abs()).all()


@pytest.mark.parametrize("network", [TinyUNet, Nested, Labelled])
def test_the_temporal_error_of_a_float16_cache_is_below_1e_6(network):
    gm = prepared(network)
    tables = feature_tables(gm)
    cache_temporal(gm, tables=tables)
    rows = {"timestep": TIMESTEPS}
    if network is Labelled:
        rows = {
            "timestep": TIMESTEPS.repeat_interleave(Labelled.classes),
            "class_labels": torch.arange(Labelled.classes).repeat(len(TIMESTEPS)),
        }
    distance = cosine_distance(features(tfmq_fx.convert(gm), **rows), list(tables.values()))
    assert distance.max() < 1e-6


def test_an_int8_table_has_a_scale_for_every_row_and_feature():
    gm = prepared()
    tables = feature_tables(gm)
    tables["linear_2"] = tables["linear_2"] * torch.logspace(-3, 3, 10)[:, None]
    tables["linear_2"][4] = 0
    cache_temporal(gm, tables=tables, cache_type="int8")
    q = tfmq_fx.convert(gm)
    stored = tensors_of(q)
    assert stored["temporal_cache.timestep.values"].dtype == torch.int8
    assert stored["temporal_cache.timestep.scale"].shape == (10, 2)
    for got, table in zip(features(q), tables.values(), strict=True):
        assert ((got - table).abs() <= table.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()
    assert torch.equal(features(q)[0][4], torch.zeros(8))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8))
@example([1.4e-45, 0.0])
def test_int8_rows_lose_half_a_step_at_most(row):
    """A step is at least the smallest normal number: half of it is more than all of a denormal one."""
    x = torch.tensor([row])
    step = max(float(x.abs().max()) / 127, torch.finfo(torch.float32).smallest_normal)
    assert ((decode(*encode(x, "int8")) - x).abs() <= step / 2 * (1 + 1e-5)).all()


def test_a_second_run_changes_nothing():
    gm = prepared()
    tables = feature_tables(gm)
    cache_temporal(gm, tables=tables)
    before = [n.format_node() for n in gm.graph.nodes]
    assert not cache_temporal(gm, tables=tables).modified
    assert [n.format_node() for n in gm.graph.nodes] == before


@pytest.mark.parametrize("first", [("linear_1",), ("linear_2",)])
def test_the_features_left_to_reconstruct_stay_bitwise_the_same(first):
    """Also where one is computed from the other; cached one after the other or at once, they end the same."""
    gm = prepared(Nested)
    with torch.no_grad():
        before = dict(zip(state_of(gm).features, features(gm), strict=True))
    tables = feature_tables(gm)
    assert list(tables) == ["linear_1", "linear_2"]
    cache_temporal(gm, tables={n: tables[n] for n in first})
    with torch.no_grad():
        after = dict(zip(state_of(gm).features, features(gm), strict=True))
    for name in tables:
        expected = tables[name].half().float() if name in first else before[name]
        assert torch.equal(after[name], expected)
    left = {layer.path for layer in state_of(gm).plan.layers if layer.temporal}
    # linear_2 is computed from linear_1, whose layer stays for it.
    gone = set() if first == ("linear_1",) else {"all.weight"}
    assert left == {"time1.weight", "time2.weight", "all.weight"} - gone
    assert gone <= set(state_of(gm).removed)
    cache_temporal(gm, tables=tables)
    assert not [layer for layer in state_of(gm).plan.layers if layer.temporal]
    assert not [n for n in gm.graph.nodes if "silu_" in str(n.target)]  # in place, and nobody's
    with torch.no_grad():
        assert all(
            torch.equal(a, tables[n].half().float()) for a, n in zip(features(gm), tables, strict=True)
        )
        q, x = tfmq_fx.convert(gm), BATCH["sample"][:4]
        at_once = prepared(Nested)
        cache_temporal(at_once, tables=tables)
        assert torch.equal(q(x, TIMESTEPS[:4]), tfmq_fx.convert(at_once)(x, TIMESTEPS[:4]))


def test_what_no_feature_needs_leaves_graph_plan_and_artefact():
    gm = prepared()
    tables = feature_tables(gm)
    cache_temporal(gm, tables={"linear_2": tables["linear_2"]})
    assert state_of(gm).removed == ("down_block.emb.bias", "down_block.emb.weight")
    assert "time_mlp.0.weight_q" in tensors_of(tfmq_fx.convert(gm))  # linear_5 needs it
    cache_temporal(gm, tables=tables)
    names = set(tensors_of(tfmq_fx.convert(gm)))
    assert not {n for n in names if "emb" in n or "time_mlp" in n or "by_timestep" in n}
    assert not {layer.path for layer in state_of(gm).plan.layers} & set(state_of(gm).removed)
    assert not [n for n, _ in gm.named_buffers() if "time_mlp" in n]


@pytest.mark.parametrize(
    ("tables", "cache_type", "words"),
    [
        (
            {"linear_9": torch.zeros(10, 8)},
            "float16",
            "'linear_9' is not a temporal feature; features are linear_5, linear_2",
        ),
        ({"linear_2": torch.zeros(9, 8)}, "float16", "its key has 10 values"),
        ({"linear_2": torch.full((10, 8), torch.nan)}, "float16", "NaN or infinite"),
        ({"linear_2": torch.full((10, 8), 1e5)}, "float16", "100000 is too large for float16"),
        ({}, "float8", "'float8' is unknown"),
    ],
)
def test_what_the_pass_refuses(tables, cache_type, words):
    with pytest.raises(TFMQError, match=words):
        cache_temporal(prepared(), tables=tables, cache_type=cache_type)


def test_a_graph_of_another_stage_is_refused():
    q = tfmq_fx.convert(prepared())
    with pytest.raises(TFMQError, match="the graph is converted, but this step needs one that is calibrated"):
        cache_temporal(q, tables={})
    with pytest.raises(TFMQError, match="cache_temporal must come before convert"):
        tfmq_fx.passes.PassManager([tfmq_fx.convert, cache_temporal])(prepared())


def test_a_class_conditional_feature_is_looked_up_by_timestep_and_label():
    gm = prepared(Labelled)
    cache_temporal(gm, tables=feature_tables(gm))
    q, network = tfmq_fx.convert(gm), make(Labelled)
    assert {c.key for c in state_of(gm).cached} == {("timestep", "class_labels")}
    assert len({c.table for c in state_of(gm).cached}) == 1
    t, y = torch.tensor([900, 0, 300, 300]), torch.tensor([4, 0, 2, 3])
    with torch.no_grad():
        emb = F.silu(network.time(sinusoid(t, 8)) + 3 * network.label(y))
        for got, expected in zip(
            features(q, timestep=t, class_labels=y), (network.emb1(emb), network.emb2(emb)), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=HALF_ULP["float16"], atol=1e-6)
    names = set(tensors_of(q))
    assert "temporal_cache.timestep_and_class_labels.values" in names
    assert "label.weight" not in names


def test_a_feature_of_one_number_can_be_cached():
    gm = prepared(Divided)
    tables = feature_tables(gm)
    (name,) = [n for n, table in tables.items() if table.dim() == 1]
    cache_temporal(gm, tables={name: tables[name]}, cache_type="bfloat16")
    got = dict(zip(state_of(gm).features, features(gm), strict=True))[name]
    assert torch.equal(got, tables[name].bfloat16().float())
