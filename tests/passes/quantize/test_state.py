"""What is known of a graph: one frozen value, which each stage replaces and convert keeps."""

import dataclasses

import pytest

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, Labelled, calibration, captured, labelled_data, make
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.state import captured_of
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.passes import rotate
from tfmq_fx.passes.quantize.plan import Note
from tfmq_fx.passes.quantize.state import require_stage, state_of, temporal_of

RECIPE = tfmq_fx.Recipe(reconstruction=FAST, maintain="cache", rotate=4)


def test_each_stage_replaces_the_state_and_convert_keeps_all_of_it():
    gm = captured()
    rotate(gm, block=4)
    rotated = captured_of(gm).low_bits
    gm = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS)
    seen = [state_of(gm)]
    for stage in (tfmq_fx.calibrate, tfmq_fx.reconstruct, maintain):
        gm = stage(gm, calibration())
        seen.append(state_of(gm))
    converted = tfmq_fx.convert(gm)
    assert [s.stage for s in seen] == ["prepared", "calibrated", "reconstructed", "reconstructed"]
    assert [len(s.reconstruction) > 0 for s in seen] == [False, False, True, True]
    assert [s.maintenance is not None for s in seen] == [False, False, False, True]
    assert [len(s.cached) for s in seen] == [0, 0, 0, 2]
    assert all(s.low_bits == rotated and s.features == seen[0].features for s in seen)
    kept, last = state_of(converted), seen[-1]
    for field in dataclasses.fields(kept):
        if field.name != "stage":
            assert getattr(kept, field.name) is getattr(last, field.name), field.name
    assert (kept.stage, last.stage) == ("converted", "reconstructed")


def test_nothing_else_is_kept_in_the_meta_of_a_converted_graph():
    gm = tfmq_fx.calibrate(tfmq_fx.prepare(captured(), RECIPE, timesteps=TIMESTEPS), calibration())
    assert list(tfmq_fx.convert(gm).meta) == ["tfmq"]


def test_a_state_is_frozen_and_its_copies_leave_it_alone():
    state = state_of(tfmq_fx.prepare(captured(), RECIPE, timesteps=TIMESTEPS))
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.stage = "converted"
    more = state.with_notes(Note(name="a", reason="b"))
    assert len(more.plan.notes) == len(state.plan.notes) + 1
    assert state_of(tfmq_fx.prepare(captured(), RECIPE, timesteps=TIMESTEPS)).plan == state.plan


def test_tables_are_those_of_the_timestep_first_and_keys_are_refused_past_the_limit():
    gm = tfmq_fx.capture(make(Labelled), labelled_data().arguments(slice(0, 2)))
    recipe = dataclasses.replace(RECIPE, max_table_entries=50, rotate=None)
    state = state_of(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS, finite={"class_labels": range(5)}))
    assert list(state.tables) == ["timestep", "class_labels"]
    assert state.sizes == {"timestep": len(TIMESTEPS), "class_labels": 5}
    assert state.table_key_of(("class_labels", "timestep")) == ("timestep", "class_labels")
    assert state.table_key_of(("timestep", "sample")) is None
    small = dataclasses.replace(state, recipe=dataclasses.replace(recipe, max_table_entries=49))
    assert small.table_key_of(("timestep", "class_labels")) is None


def test_a_float_graph_has_no_such_state():
    gm = captured()
    for ask in (state_of, temporal_of, lambda g: require_stage(g, "prepared")):
        with pytest.raises(TFMQError, match="the graph is a float graph"):
            ask(gm)
    prepared = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match="the graph is prepared, but this step needs one that is calibrated"):
        require_stage(prepared, "calibrated")
    assert not captured_of(gm).stage  # prepare works on a copy
