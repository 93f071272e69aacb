"""Cached temporal features, and the choice between the cache and the reconstructed block."""

import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, ScalarTime, TinyUNet, calibration, make, sinusoid
from tests.helpers.lowered import lower
from tests.test_cli import run
from tests.whole.test_finite import Labelled, labelled_data
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.saving import WEIGHTS
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.metrics import cosine_distance
from tfmq_fx.calibration.temporal_rows import run_temporal
from tfmq_fx.graph.nodes import fresh, op_name
from tfmq_fx.maintenance.choice import Option, choose, total_bytes, total_disturbance
from tfmq_fx.maintenance.measuring import stored_bytes
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.maintenance.tables import feature_tables
from tfmq_fx.passes import cache_temporal, extract_temporal, inline_modules
from tfmq_fx.passes.quantize.cache_temporal import decode, encode
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.temporal.find_temporal import temporal_of

NEAREST = tfmq_fx.Reconstruction(method="nearest")
W4A8 = tfmq_fx.Recipe(reconstruction=NEAREST)
FINITE = {"class_labels": range(Labelled.classes)}
# Half a unit in the last place, relative to the value: float16 has 11 bits of mantissa, bfloat16 8.
HALF_ULP = {"float16": 2**-11, "bfloat16": 2**-8}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_blocks_are_reconstructed_on_the_features_that_they_will_look_up():
    """So they get the integers that they would beside a temporal block left in float."""

    def integers(**changes):
        recipe = tfmq_fx.Recipe(
            reconstruction=tfmq_fx.Reconstruction(method="gptq", tune_iterations=5), **changes
        )
        gm = tfmq_fx.capture(make(TinyUNet), {n: x[:2] for n, x in calibration().tensors.items()})
        gm = tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), calibration())
        gm = tfmq_fx.reconstruct(gm, calibration())
        temporal = {x.node for x in gm.meta["plan"].layers if x.temporal}
        assert len(temporal) == 4
        block = extract_temporal(gm, temporal_of(gm))
        for _, o in observers(block):  # as they were
            assert o.fake_quant_enabled[0]
        return {
            x.path: dict(observers(gm))[nodes(gm)[x.node].args[1]].q
            for x in gm.meta["plan"].layers
            if not x.temporal
        }

    def nodes(gm):
        return {n.name: n for n in gm.graph.nodes}

    float_block = tuple(
        tfmq_fx.Rule(pattern=p, weight_bits=16, activation_bits=16) for p in ("time_mlp.*", "*.emb.*")
    )
    cached, beside_float = integers(maintain="cache"), integers(rules=float_block)
    other = integers()
    assert all(torch.equal(q, beside_float[path]) for path, q in cached.items())
    assert not all(torch.equal(q, other[path]) for path, q in cached.items())


class Nested(nn.Module):
    """A feature that a further layer of the block reads, as where one embedding serves every block; and a layer in place."""

    def __init__(self):
        super().__init__()
        self.time1, self.time2, self.all = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 8)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.mid = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timestep):
        emb = self.time2(F.silu(self.time1(sinusoid(timestep, 8)), inplace=True))
        shift, scale = self.all(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.mid(F.silu(self.conv1(sample) * (1 + scale) + shift))
        return self.conv2(h + F.silu(emb)[:, :, None, None])


class Guided(nn.Module):
    """Two features of the timestep alone, and one that a guidance scale without a table joins."""

    def __init__(self):
        super().__init__()
        self.time, self.guidance = nn.Linear(8, 16), nn.Linear(1, 16)
        self.emb1, self.emb2, self.emb3 = nn.Linear(16, 4), nn.Linear(16, 4), nn.Linear(16, 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.mid = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timestep, guidance):
        t = self.time(sinusoid(timestep, 8))
        emb, both = F.silu(t), F.silu(t + self.guidance(guidance[:, None]))
        h = F.silu(self.conv1(sample) + self.emb1(emb)[:, :, None, None] + self.emb2(both)[:, :, None, None])
        return self.conv2(F.silu(self.mid(h) + self.emb3(emb)[:, :, None, None]))


class Scaled(nn.Module):
    """The output is divided by the timestep itself, a feature of one number and no weight."""

    def __init__(self):
        super().__init__()
        self.time, self.emb = nn.Linear(8, 16), nn.Linear(16, 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample, timestep):
        emb = self.emb(F.silu(self.time(sinusoid(timestep, 8))))
        h = self.conv2(F.silu(self.conv1(sample) + emb[:, :, None, None]))
        return h / torch.floor(timestep / 7 + 1)[:, None, None, None]


def guided_data():
    tensors = calibration().tensors
    guidance = torch.rand(40, generator=torch.Generator().manual_seed(1))
    return tfmq_fx.CalibrationSet.from_tensors({**tensors, "guidance": guidance})


DATA = {
    TinyUNet: calibration,
    Scaled: calibration,
    Nested: calibration,
    Labelled: labelled_data,
    Guided: guided_data,
}


@functools.cache
def once(network, bits="w4a8", keyed="block"):
    data = DATA[network]()
    gm = tfmq_fx.capture(make(network), data.arguments(slice(0, 2)))
    recipe = dataclasses.replace(tfmq_fx.Recipe.preset(bits), reconstruction=NEAREST, keyed=keyed)
    finite = FINITE if network is Labelled else None
    return tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS, finite=finite), data)


def prepared(network=TinyUNet, bits="w4a8", keyed="block", **changes):
    """A calibrated graph of one's own; its recipe changed."""
    gm = fresh(once(network, bits, keyed))
    gm.meta["recipe"] = dataclasses.replace(gm.meta["recipe"], **changes)
    return gm


def maintained(network=TinyUNet, **changes):
    gm = maintain(prepared(network, **changes), DATA[network]())
    return tfmq_fx.convert(gm)


def block_of(gm):
    return extract_temporal(gm, temporal_of(gm))


def features(gm, **rows):
    block = gm.get_submodule("temporal_block") if gm.meta["stage"] == "converted" else block_of(gm)
    return run_temporal(block, rows or {"timestep": TIMESTEPS})


@functools.cache
def quantized(maintenance="cache", **changes):
    recipe = dataclasses.replace(W4A8, maintain=maintenance, **changes)
    return tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration())


BATCH = calibration().tensors
X, T = BATCH["sample"][:6], torch.tensor([900, 0, 300, 300, 100, 800])


# The pass


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


def test_the_tables_are_the_float_blocks_values():
    network, tables = make(TinyUNet), feature_tables(prepared())
    with torch.no_grad():
        emb = F.silu(network.time_mlp(sinusoid(TIMESTEPS, 16)))
        expected = [network.down_block.emb(emb), network.up_block.emb(emb)]
    for table, value in zip(tables.values(), expected, strict=True):
        torch.testing.assert_close(table, value)


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
def test_int8_rows_lose_half_a_step_at_most(row):
    x = torch.tensor([row])
    assert ((decode(*encode(x, "int8")) - x).abs() <= x.abs().max() / 254 * (1 + 1e-5)).all()


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
        before = dict(zip(gm.meta["features"], features(gm), strict=True))
    tables = feature_tables(gm)
    assert list(tables) == ["linear_1", "linear_2"]
    cache_temporal(gm, tables={n: tables[n] for n in first})
    with torch.no_grad():
        after = dict(zip(gm.meta["features"], features(gm), strict=True))
    for name in tables:
        expected = tables[name].half().float() if name in first else before[name]
        assert torch.equal(after[name], expected)
    left = {layer.path for layer in gm.meta["plan"].layers if layer.temporal}
    # linear_2 is computed from linear_1, whose layer stays for it.
    gone = set() if first == ("linear_1",) else {"all.weight"}
    assert left == {"time1.weight", "time2.weight", "all.weight"} - gone
    assert gone <= set(gm.meta["removed"])
    cache_temporal(gm, tables=tables)
    assert not [layer for layer in gm.meta["plan"].layers if layer.temporal]
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
    assert gm.meta["removed"] == ("down_block.emb.bias", "down_block.emb.weight")
    assert "time_mlp.0.weight_q" in tensors_of(tfmq_fx.convert(gm))  # linear_5 needs it
    cache_temporal(gm, tables=tables)
    names = set(tensors_of(tfmq_fx.convert(gm)))
    assert not {n for n in names if "emb" in n or "time_mlp" in n or "by_timestep" in n}
    assert not {layer.path for layer in gm.meta["plan"].layers} & set(gm.meta["removed"])
    assert not [n for n, _ in gm.named_buffers() if "time_mlp" in n]


def test_a_timestep_of_shape_0_and_a_whole_network_of_one_call():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": BATCH["timestep"]})
    gm = tfmq_fx.capture(make(ScalarTime), {"sample": x[:3], "timestep": torch.tensor(900)})
    recipe = dataclasses.replace(W4A8, maintain="auto")
    gm = tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), data)
    network = make(ScalarTime)
    q = tfmq_fx.convert(maintain(gm, data))
    assert [c.name for c in gm.meta["cached"]] == list(gm.meta["features"])
    with torch.no_grad():
        for t in (900, 200):
            (feature,) = q.get_submodule("temporal_block")(torch.tensor(t))
            expected = network.time(sinusoid(torch.tensor(t), 8))
            assert feature.shape == expected.shape
            torch.testing.assert_close(feature, expected, rtol=HALF_ULP["float16"], atol=1e-6)
            assert q(x[:5], torch.tensor(t)).shape == (5, 4)


def test_a_graph_of_symbolic_trace_without_shapes():
    gm = torch.fx.symbolic_trace(make(TinyUNet))
    inline_modules(gm)
    gm = tfmq_fx.calibrate(
        tfmq_fx.prepare(gm, dataclasses.replace(W4A8, maintain="auto"), timesteps=TIMESTEPS), calibration()
    )
    expected = list(feature_tables(gm).values())
    q = tfmq_fx.convert(maintain(gm, calibration()))
    for got, table in zip(features(q), expected, strict=True):
        assert torch.equal(got, table.half().float())
    assert gm.meta["maintenance"]["bytes"]["chosen"] == 400


@pytest.mark.parametrize(
    ("tables", "cache_type", "words"),
    [
        (
            {"linear_9": torch.zeros(10, 8)},
            "float16",
            "'linear_9' is no temporal feature; features are linear_5, linear_2",
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
    with pytest.raises(TFMQError, match="the graph is converted, but this step needs it calibrated"):
        cache_temporal(q, tables={})
    with pytest.raises(TFMQError, match="cache_temporal must come before convert"):
        tfmq_fx.passes.PassManager([tfmq_fx.convert, cache_temporal])(prepared())


# Keys


def test_a_class_conditional_feature_is_looked_up_by_timestep_and_label():
    gm = prepared(Labelled)
    cache_temporal(gm, tables=feature_tables(gm))
    q, network = tfmq_fx.convert(gm), make(Labelled)
    assert {c.key for c in gm.meta["cached"]} == {("timestep", "class_labels")}
    assert len({c.table for c in gm.meta["cached"]}) == 1
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


def test_past_max_table_entries_a_feature_has_no_table():
    gm = prepared(Labelled, maintain="cache", max_table_entries=49)
    with pytest.raises(
        TFMQError, match="10 x 5 values of timestep, class_labels exceed max_table_entries=49"
    ):
        maintain(gm, labelled_data())


def test_a_continuous_conditioning_is_refused_by_cache_and_reconstructed_by_auto():
    with pytest.raises(
        TFMQError, match=r"feature linear_\d: cannot be cached: it depends on guidance, not declared"
    ):
        maintain(prepared(Guided, maintain="cache"), guided_data())
    q = maintained(Guided, maintain="auto")
    rows = {r["path"]: r for r in q.meta["maintenance"]["features"]}
    assert {p: r["chosen"] for p, r in rows.items()} == {
        "emb1.weight": "cache", "emb2.weight": "reconstruct", "emb3.weight": "cache"
    }  # fmt: skip
    assert rows["emb2.weight"]["why"] == "it depends on guidance, not declared finite"
    assert list(rows["emb2.weight"]["disturbance"]) == ["reconstruct"]
    assert q.meta["maintenance"]["bytes"]["cache"] == q.meta["maintenance"]["bytes"]["chosen"]
    (note,) = [n for n in q.meta["plan"].notes if "not cached" in n.reason]
    assert not note.coarser
    assert {"time.weight_q", "emb2.weight_q"} <= set(tensors_of(q))
    assert not {"emb1.weight_q", "emb3.weight_q"} & set(tensors_of(q))


@pytest.mark.parametrize("maintenance", ["cache", "auto"])
def test_a_feature_without_weights_stays_computed(maintenance):
    q = maintained(Scaled, maintain=maintenance)
    rows = {r["path"]: (r["chosen"], r["why"]) for r in q.meta["maintenance"]["features"]}
    assert rows.pop("emb.weight")[0] == "cache"
    assert list(rows.values()) == [("reconstruct", "it takes no bytes as it is")]
    with torch.no_grad():
        assert torch.equal(
            features(q)[[len(f.shape) for f in features(q)].index(1)], torch.floor(TIMESTEPS / 7 + 1)
        )


def test_a_feature_of_one_number_can_be_cached():
    gm = prepared(Scaled)
    tables = feature_tables(gm)
    (name,) = [n for n, table in tables.items() if table.dim() == 1]
    cache_temporal(gm, tables={name: tables[name]}, cache_type="bfloat16")
    got = dict(zip(gm.meta["features"], features(gm), strict=True))[name]
    assert torch.equal(got, tables[name].bfloat16().float())


# The choice


def option(tensors, distance=0.0, effect=0.0):
    return Option(tensors=tensors, distance=distance, effect=effect)


def two(*, cache=(80, 80), effect=(1e-6, 1e-6), own=60, shared=50):
    """Two features whose reconstruction shares `shared` bytes; the table of timesteps is always there."""
    return {
        name: {
            "reconstruct": option({f"{name}.weight": own, "mlp": shared}, effect=effect[i]),
            "cache": option({f"{name}: cached": cache[i]}, distance=1e-8),
        }
        for i, name in enumerate("ab")
    }


BOTH_CACHED, BOTH_KEPT = {"a": "cache", "b": "cache"}, {"a": "reconstruct", "b": "reconstruct"}


def test_the_fewer_bytes_are_taken():
    assert choose(two(cache=(40, 70), shared=0), bound=1e-3) == {"a": "cache", "b": "reconstruct"}


def test_shared_bytes_go_when_the_last_feature_is_cached():
    """Each cache alone is larger than the layer it stands for (80 against 60); both together free the 50 that they share."""
    assert choose(two(), bound=1e-3) == BOTH_CACHED
    assert choose(two(shared=39), bound=1e-3) == BOTH_KEPT


def test_the_bound_overrules_the_bytes():
    assert choose(two(effect=(1e-2, 1e-6), shared=0), bound=1e-3) == {"a": "cache", "b": "reconstruct"}
    far = {"a": {"reconstruct": option({"w": 9}, effect=0.2), "cache": option({"c": 1}, distance=0.3)}}
    assert choose(far, bound=1e-3) == {"a": "reconstruct"}  # neither is within it: the better one


def test_a_budget_is_spent_on_the_largest_disturbance():
    options = two(effect=(1e-4, 5e-4), shared=0)
    assert choose(options, bound=1e-3) == BOTH_KEPT
    assert choose(options, bound=1e-3, budget=120) == BOTH_KEPT
    assert choose(options, bound=1e-3, budget=140) == {"a": "reconstruct", "b": "cache"}
    assert choose(options, bound=1e-3, budget=160) == BOTH_CACHED


def test_a_budget_below_the_bounds_smallest_choice_lifts_the_bound():
    options = two(effect=(1e-2, 1e-2), shared=0)
    assert choose(options, bound=1e-3) == BOTH_CACHED
    assert choose(options, bound=1e-3, budget=150) in (
        {"a": "cache", "b": "reconstruct"},
        {"a": "reconstruct", "b": "cache"},
    )
    with pytest.raises(TFMQError, match="need 120 bytes at least"):
        choose(options, bound=1e-3, budget=119)


sizes = st.integers(1, 200)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(sizes, sizes, st.floats(1e-9, 1e-2), st.booleans()), min_size=1, max_size=5),
    sizes,
    st.floats(1e-8, 1e-2),
    st.integers(0, 1500) | st.none(),
)
def test_no_pure_choice_beats_the_selection(given_features, shared, bound, spare):
    """Against every possible choice by brute force, too: the bound is kept where it can be, a budget always."""
    options = {
        str(i): {
            "reconstruct": option({f"{i}.w": own, **({"mlp": shared} if shares else {})}, effect=effect),
            "cache": option({f"{i}.c": cache}, distance=1e-9),
        }
        for i, (own, cache, effect, shares) in enumerate(given_features)
    }
    every = [
        dict(zip(options, c, strict=True))
        for c in itertools.product(("reconstruct", "cache"), repeat=len(options))
    ]
    least = min(total_bytes(options, c) for c in every)
    budget = None if spare is None else least + spare
    try:
        chosen = choose(options, bound=bound, budget=budget)
    except TFMQError:
        assert budget is not None  # greedy, it may miss the one smallest choice, never by a pure one
        assert all(total_bytes(options, dict.fromkeys(options, m)) > budget for m in ("reconstruct", "cache"))
        return
    size, harm = total_bytes(options, chosen), total_disturbance(options, chosen)
    assert budget is None or size <= budget
    if budget is None:
        assert all(options[f][m].disturbance <= bound for f, m in chosen.items())
    for maintenance in ("reconstruct", "cache"):
        pure = dict.fromkeys(options, maintenance)
        assert not (
            total_bytes(options, pure) <= size
            and total_disturbance(options, pure) <= harm
            and (total_bytes(options, pure), total_disturbance(options, pure)) != (size, harm)
        )


def test_auto_measures_and_reports_every_feature():
    q = maintained(maintain="auto")
    found = q.meta["maintenance"]
    assert [r["path"] for r in found["features"]] == ["down_block.emb.weight", "up_block.emb.weight"]
    for row in found["features"]:
        assert row["chosen"] == "cache"  # ten rows of float16 against 32 columns of 4 bit, and less error
        assert row["key"] == ("timestep",)
        assert 0 <= row["disturbance"]["cache"] < 1e-6 < row["disturbance"]["reconstruct"]
        assert 0 <= row["effect"]["cache"] < row["effect"]["reconstruct"]
    assert found["seconds_per_call"]["chosen"] < found["seconds_per_call"]["reconstruct"]


def test_the_recipes_bound_and_budget_reach_the_choice():
    # Nothing is within it, so the smaller disturbance decides: bytes at 8 bits against the table's own.
    q = maintained(bits="w8a8", maintain="auto", maintain_bound=0.0, cache_type="int8")
    assert {r["chosen"] for r in q.meta["maintenance"]["features"]} == {"reconstruct"}
    assert q.meta["maintenance"]["bytes"]["chosen"] == q.meta["maintenance"]["bytes"]["reconstruct"]
    assert {n.reason for n in q.meta["plan"].notes if n.coarser} == {"disturbance over maintain_bound=0"}
    with pytest.raises(TFMQError, match="need 400 bytes at least"):
        maintained(maintain="auto", maintain_bytes=399)


def test_strict_refuses_a_feature_over_the_bound():
    recipe = dataclasses.replace(W4A8, maintain="auto", maintain_bound=0.0)
    with pytest.raises(
        TFMQError, match=r"strict: 2 deviation\(s\).*linear_2: disturbance over maintain_bound=0"
    ):
        tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration(), strict=True)


def test_the_effect_of_a_feature_is_that_of_its_error_alone():
    """Against the eager network, one embedding layer's output replaced by hand."""
    gm = prepared(maintain="auto")
    with torch.no_grad():
        by_feature = features(gm, timestep=T)
    network, data = make(TinyUNet), calibration().spread(32, seed=0).tensors
    q = tfmq_fx.convert(maintain(gm, calibration()))
    with torch.no_grad():
        wrong = features(prepared(), timestep=data["timestep"])
        exact = network(data["sample"], data["timestep"])
        for i, layer in enumerate((network.down_block.emb, network.up_block.emb)):
            handle = layer.register_forward_hook(lambda *_, i=i: wrong[i])
            error = network(data["sample"], data["timestep"]) - exact
            handle.remove()
            expected = (error.square().sum() / exact.square().sum()).item()
            got = q.meta["maintenance"]["features"][i]["effect"]["reconstruct"]
            assert got == pytest.approx(expected, rel=1e-3)
    assert len(by_feature) == 2


def test_reconstruct_leaves_the_graph_as_it_is():
    gm = prepared(maintain="reconstruct")
    before = [n.format_node() for n in gm.graph.nodes]
    assert maintain(gm, calibration()) is gm
    assert [n.format_node() for n in gm.graph.nodes] == before
    assert "maintenance" not in gm.meta


@pytest.mark.parametrize(
    "changes",
    [
        {"maintain": "remember"},
        {"cache_type": "int4"},
        {"maintain_bound": -1.0},
        {"maintain_bytes": 0},
        {"maintain_bytes": 9, "maintain": "cache"},
    ],
)
def test_a_recipe_checks_its_maintenance(changes):
    with pytest.raises(TFMQError, match=f"Recipe.{next(iter(changes))}"):
        tfmq_fx.Recipe(**changes)


# The whole model


@pytest.mark.parametrize("cache_type", ["float16", "int8"])
def test_it_is_saved_and_loaded_bit_by_bit(tmp_path, cache_type):
    q = quantized(cache_type=cache_type)
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded(X, T), q(X, T))
    assert not [n for n in load_file(tmp_path / "q" / WEIGHTS) if "time_mlp" in n or "emb" in n]
    assert loaded.report["maintenance"]["maintain"] == "cache"


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        (TinyUNet, {}),
        (TinyUNet, {"bits": "w3a8", "keyed": "all"}),
        (TinyUNet, {"bits": "w4a16"}),
        (Nested, {"cache_type": "int8"}),
        (Labelled, {"cache_type": "int8"}),
    ],
    ids=str,
)
def test_the_bytes_of_the_report_are_those_on_disk(tmp_path, changes, network):
    """Of the whole artefact: what is not temporal is the same in both."""

    def on_disk(q, name):
        kept = {n: x.numel() * x.element_size() for n, x in load_file(tmp_path / name / WEIGHTS).items()}
        assert kept == stored_bytes(q)
        return sum(kept.values())

    found = {}
    for maintenance in ("reconstruct", "cache"):
        gm = maintained(network, maintain=maintenance, **changes)
        if maintenance == "cache":
            claimed = gm.meta["maintenance"]["bytes"]
        save(gm, tmp_path / maintenance)
        found[maintenance] = on_disk(gm, maintenance)
    assert found["reconstruct"] - found["cache"] == claimed["reconstruct"] - claimed["cache"]
    assert claimed["chosen"] == claimed["cache"]


def save(gm, folder):
    """The weights of a converted graph as `save_pretrained` writes them."""
    model = quantized()
    other = tfmq_fx.QuantizedModel(
        gm, interface=model.interface, timesteps=model.timesteps, config={}, recipe={}, report={}
    )
    other.save_pretrained(folder)


def test_it_compiles_without_a_recompile_between_steps():
    q = quantized()
    torch._dynamo.reset()
    compiled = torch.compile(q, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in (900, 300, 0):
            step = torch.full((6,), t)
            torch.testing.assert_close(compiled(X, step), q(X, step))


def test_it_exports_as_pt2(tmp_path):
    q = quantized()
    q.export(tmp_path / "q.pt2")
    program = torch.export.load(tmp_path / "q.pt2").module()
    with torch.no_grad():
        assert torch.equal(program(sample=X, timestep=T), q(X, T))


@pytest.mark.parametrize("cache_type", ["float16", "int8"])
def test_it_is_lowered(cache_type):
    pytest.importorskip("openvino", reason="lowering needs the openvino extra")
    q = quantized(cache_type=cache_type)
    low = lower(q, "cpu", precision="float32", batch=6)
    with torch.no_grad():
        expected, got = q(X, T), low(X, T)
    step = (expected.max() - expected.min()) / 255  # rounding ties may fall the other way
    assert (got - expected).abs().max() <= 3 * step


def test_timesteps_outside_the_table_take_the_nearest_features():
    q = quantized()
    block = q.temporal_block
    with torch.no_grad():
        for t, nearest in ((449, 400), (451, 500), (5000, 900)):
            for a, b in zip(block(torch.tensor([t])), block(torch.tensor([nearest])), strict=True):
                assert torch.equal(a, b)
        q(X[:2], torch.tensor([449, 900]))
    assert q.report["unseen_timesteps"] == {"449": 1}
    q._unseen["timestep"].clear()


def test_the_report_counts_what_is_there():
    report = quantized().report
    paths = {layer["path"] for layer in report["layers"]} | {f["name"] for f in report["float"]}
    assert not {p for p in paths if "time_mlp" in p or ".emb." in p}
    network = make(TinyUNet)
    left = sum(p.numel() for n, p in network.named_parameters() if "time_mlp" not in n and ".emb." not in n)
    assert report["sizes"]["quantized_weights"] + report["sizes"]["float_parameters"] == left
    assert report["sizes"]["quantized_bytes"] == sum(stored_bytes(quantized().network).values())


def test_the_command_line_passes_it_on_and_says_what_was_cached(monkeypatch, capsys, tmp_path):
    taken = []

    def instead(_pipe, recipe, **_):
        taken.append(recipe.maintain)
        return quantized()

    monkeypatch.setattr("tfmq_fx.pipeline.quantize", instead)
    options = (tmp_path / "q", "--num-samples", 1, "--steps", 1)
    code, _, err = run(monkeypatch, capsys, "quantize", *options, "--maintain", "remember")
    assert code == 2
    assert "Recipe.maintain: 'remember' is unknown; use one of reconstruct, cache, auto" in err
    code, out, _ = run(monkeypatch, capsys, "quantize", *options, "--maintain", "cache")
    assert code == 0
    assert taken == ["cache"]
    assert "maintenance: 2 of 2 temporal features cached; 0.4 kB for them all, reconstructed 2.4 kB" in out
