"""Each feature cached or reconstructed, and what is reported of it."""

import dataclasses

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, ScalarTime, TinyUNet, calibration, make, sinusoid
from tests.helpers.maintenance import (
    BATCH,
    W4A8,
    Guided,
    Scaled,
    divisors,
    features,
    guided_data,
    maintained,
    prepared,
)
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.maintenance.tables import feature_tables
from tfmq_fx.passes import inline_modules
from tfmq_fx.passes.quantize.state import state_of

# Half a unit in the last place, relative to the value: float16 has 11 bits of mantissa, bfloat16 8.
HALF_ULP = {"float16": 2**-11, "bfloat16": 2**-8}


def test_a_timestep_of_shape_0_and_a_whole_network_of_one_call():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": BATCH["timestep"]})
    gm = tfmq_fx.capture(make(ScalarTime), {"sample": x[:3], "timestep": torch.tensor(900)})
    recipe = dataclasses.replace(W4A8, maintain="auto")
    gm = tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), data)
    network = make(ScalarTime)
    q = tfmq_fx.convert(maintain(gm, data))
    assert [c.name for c in state_of(gm).cached] == list(state_of(gm).features)
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
    assert dataclasses.asdict(state_of(gm).maintenance)["bytes"]["chosen"] == 400


def test_a_continuous_conditioning_is_from_outside_with_cache():
    gm = maintain(prepared(Guided, maintain="cache"), guided_data())
    state = state_of(gm)
    assert state.outside == ("linear_3",)
    assert [row.chosen for row in state.maintenance.features] == ["cache", "request", "cache"]
    assert list(placeholders(gm)) == ["sample", "timestep", "guidance", "linear_3"]
    assert not {"emb2.weight", "guidance.weight", "time.weight"} & set(tensors_of(tfmq_fx.convert(gm)))


def test_a_table_over_too_many_values_is_refused_where_the_timestep_is_one_for_all():
    class Both(ScalarTime):
        def forward(self, sample, timestep, shift):
            return self.head(self.body(sample) + self.time(sinusoid(timestep, 8) + shift[:, None]))

    x, shift = torch.randn(40, 4), torch.rand(40)
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": BATCH["timestep"], "shift": shift})
    given = {"sample": x[:3], "timestep": torch.tensor(900), "shift": shift[:3]}
    gm = tfmq_fx.prepare(
        tfmq_fx.capture(make(Both), given), dataclasses.replace(W4A8, maintain="cache"), timesteps=TIMESTEPS
    )
    with pytest.raises(TFMQError, match="cannot be cached: it depends on shift, not declared finite"):
        maintain(tfmq_fx.calibrate(gm, data), data)


def test_a_continuous_conditioning_is_reconstructed_by_auto():
    q = maintained(Guided, maintain="auto")
    rows = {r["path"]: r for r in dataclasses.asdict(state_of(q).maintenance)["features"]}
    assert {p: r["chosen"] for p, r in rows.items()} == {
        "emb1.weight": "cache", "emb2.weight": "reconstruct", "emb3.weight": "cache"
    }  # fmt: skip
    assert rows["emb2.weight"]["why"] == "it depends on guidance, not declared finite"
    assert list(rows["emb2.weight"]["disturbance"]) == ["reconstruct"]
    assert (
        dataclasses.asdict(state_of(q).maintenance)["bytes"]["cache"]
        == dataclasses.asdict(state_of(q).maintenance)["bytes"]["chosen"]
    )
    (note,) = [n for n in state_of(q).plan.notes if "not cached" in n.reason]
    assert not note.coarser
    assert {"time.weight_q", "emb2.weight_q"} <= set(tensors_of(q))
    assert not {"emb1.weight_q", "emb3.weight_q"} & set(tensors_of(q))


@pytest.mark.parametrize("maintenance", ["cache", "auto"])
def test_a_feature_without_weights_stays_computed(maintenance):
    q = maintained(Scaled, maintain=maintenance)
    rows = {
        r["path"]: (r["chosen"], r["why"]) for r in dataclasses.asdict(state_of(q).maintenance)["features"]
    }
    assert rows.pop("emb.weight")[0] == "cache"
    assert list(rows.values()) == [("reconstruct", "computing it takes no bytes")]
    columns = calibration().tensors["sample"].shape[-1]
    with torch.no_grad():
        assert torch.equal(
            next(f for f in features(q) if f.shape[-1] == columns), divisors(TIMESTEPS, columns)
        )


def test_auto_measures_and_reports_every_feature():
    q = maintained(maintain="auto")
    found = dataclasses.asdict(state_of(q).maintenance)
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
    assert {r["chosen"] for r in dataclasses.asdict(state_of(q).maintenance)["features"]} == {"reconstruct"}
    assert (
        dataclasses.asdict(state_of(q).maintenance)["bytes"]["chosen"]
        == dataclasses.asdict(state_of(q).maintenance)["bytes"]["reconstruct"]
    )
    assert {n.reason for n in state_of(q).plan.notes if n.coarser} == {"disturbance over maintain_bound=0"}
    with pytest.raises(TFMQError, match="need at least 400 bytes"):
        maintained(maintain="auto", maintain_bytes=399)


def test_strict_refuses_a_feature_over_the_bound():
    recipe = dataclasses.replace(W4A8, maintain="auto", maintain_bound=0.0)
    with pytest.raises(
        TFMQError, match=r"strict: 2 deviation\(s\).*linear_2: disturbance over maintain_bound=0"
    ):
        tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration(), strict=True)


def test_reconstruct_leaves_the_graph_as_it_is():
    gm = prepared(maintain="reconstruct")
    before = [n.format_node() for n in gm.graph.nodes]
    assert maintain(gm, calibration()) is gm
    assert [n.format_node() for n in gm.graph.nodes] == before
    assert "maintenance" not in gm.meta
