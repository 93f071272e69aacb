"""Other finite inputs in the key of the temporal block: class labels, size ids, guidance; and what has no table."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import (
    FAST,
    TIMESTEPS,
    Labelled,
    Sized,
    labelled_data,
    make,
    sinusoid,
    sized_data,
)
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.temporal_rows import run_temporal, temporal_rows
from tfmq_fx.observers import TemporalObserver
from tfmq_fx.passes import extract_temporal, find_temporal
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.state import state_of, temporal_of

RECIPE = tfmq_fx.Recipe(reconstruction=FAST)


def prepared(recipe=RECIPE, **kwargs):
    data = labelled_data()
    gm = tfmq_fx.capture(make(Labelled), data.arguments(slice(0, 2)))
    return tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS, **kwargs), data


def tables(gm):
    return {
        str(n.args[0]): (o.num_keys, str(n.args[1]))
        for n, o in observers(gm)
        if isinstance(o, TemporalObserver)
    }


def test_a_finite_label_joins_the_key():
    gm, data = prepared(finite={"class_labels": range(Labelled.classes)})
    assert set(tables(gm).values()) == {(10, "step_index"), (50, "timestep_and_class_labels_index")}
    assert state_of(gm).plan.notes == ()
    assert {layer.path: layer.key for layer in state_of(gm).plan.layers if layer.temporal} == {
        "time.weight": ("timestep",),
        "emb1.weight": ("timestep", "class_labels"),
        "emb2.weight": ("timestep", "class_labels"),
    }
    rows = temporal_rows(gm, data.tensors)
    pairs = set(zip(rows["timestep"].tolist(), rows["class_labels"].tolist(), strict=True))
    assert len(rows["timestep"]) == len(pairs) == 50  # the whole product, no data
    tfmq_fx.calibrate(gm, data)
    for _, observer in observers(gm):
        if isinstance(observer, TemporalObserver):
            assert observer.seen.all()


def test_each_pair_has_the_range_of_its_own_values():
    gm, data = prepared(finite={"class_labels": range(Labelled.classes)})
    network = make(Labelled)
    tfmq_fx.calibrate(gm, data)
    (observer,) = {
        id(o): o for _, o in observers(gm) if isinstance(o, TemporalObserver) and o.num_keys == 50
    }.values()
    with torch.no_grad():
        for step, label in ((0, 0), (3, 4), (9, 2)):
            emb = F.silu(
                network.time(sinusoid(TIMESTEPS[step : step + 1], 8))
                + 3 * network.label(torch.tensor([label]))
            )
            span = emb.amax().clamp(min=0) - emb.amin().clamp(max=0)
            torch.testing.assert_close(observer.scale[step * 5 + label], span / 255)


def test_past_max_table_entries_the_key_is_the_timestep_and_the_report_says_so():
    recipe = dataclasses.replace(RECIPE, max_table_entries=49)
    gm, data = prepared(recipe, finite={"class_labels": range(Labelled.classes)})
    assert set(tables(gm).values()) == {(10, "step_index")}
    (note,) = {n.reason for n in state_of(gm).plan.notes}
    assert note == (
        "one scale per timestep over sampled values: 10 x 5 values of class_labels, timestep exceed max_table_entries=49"
    )
    pairs = set(zip(data.tensors["timestep"].tolist(), data.tensors["class_labels"].tolist(), strict=True))
    rows = temporal_rows(gm, data.tensors)
    assert pairs <= set(zip(rows["timestep"].tolist(), rows["class_labels"].tolist(), strict=True))


def test_an_undeclared_input_stays_in_the_block_on_sampled_rows():
    gm, data = prepared()
    (note,) = {n.reason for n in state_of(gm).plan.notes}
    assert note == "one scale per timestep over sampled values: depends on class_labels, not declared finite"
    assert set(temporal_of(gm).keys) == {"timestep", "class_labels"}
    tfmq_fx.reconstruct(tfmq_fx.calibrate(gm, data), data)
    temporal = state_of(gm).reconstruction[0]
    assert temporal.name == "temporal_block"
    assert temporal.error < temporal.error_nearest


def test_tiar_learns_on_the_product():
    gm, data = prepared(finite={"class_labels": range(Labelled.classes)})
    tfmq_fx.reconstruct(tfmq_fx.calibrate(gm, data), data)
    temporal = state_of(gm).reconstruction[0]
    assert temporal.error < 0.7 * temporal.error_nearest


def test_tiar_in_batches_of_keys_is_deterministic():
    settings = dataclasses.replace(FAST, temporal_batch_size=16)
    results = []
    for _ in range(2):
        gm, data = prepared(
            tfmq_fx.Recipe(reconstruction=settings), finite={"class_labels": range(Labelled.classes)}
        )
        tfmq_fx.reconstruct(tfmq_fx.calibrate(gm, data), data, seed=3)
        rows = temporal_rows(gm, data.tensors)
        with torch.no_grad():
            results.append(run_temporal(extract_temporal(gm, temporal_of(gm)), rows))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture(scope="module")
def labelled():
    return tfmq_fx.quantize(
        make(Labelled), RECIPE, calibration=labelled_data(), finite={"class_labels": range(Labelled.classes)}
    )


def test_the_quantized_network_is_near_the_float_one_for_every_pair(labelled):
    network = make(Labelled)
    t = TIMESTEPS.repeat_interleave(Labelled.classes)
    y = torch.arange(Labelled.classes).repeat(len(TIMESTEPS))
    x = torch.randn(50, 1, 6, 6)
    with torch.no_grad():
        error = (labelled(x, t, y) - network(x, t, y)).square().mean() / network(x, t, y).square().mean()
    assert error < 0.02  # 4-bit weights of a network of 500 weights
    assert labelled.report["temporal_block"]["finite"] == {"class_labels": 5}
    assert labelled.report["unseen_values"] == {"class_labels": {}}
    errors = [e["temporal_cosine_distance"] for e in labelled.report["errors_by_timestep"]]
    assert len(errors) == 10
    assert max(errors) < 0.01


def test_a_label_outside_the_declared_values_is_counted(tmp_path, labelled):
    labelled.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    assert {n: v.tolist() for n, v in loaded.finite.items()} == {"class_labels": [0, 1, 2, 3, 4]}
    x, t, y = torch.randn(2, 1, 6, 6), torch.tensor([0, 900]), torch.tensor([1, 4])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, y), labelled(x, t, y))
    few = tfmq_fx.quantize(
        make(Labelled),
        dataclasses.replace(RECIPE, reconstruction=tfmq_fx.Reconstruction(method="nearest")),
        calibration=tfmq_fx.CalibrationSet.from_tensors(
            {n: v % 3 if n == "class_labels" else v for n, v in labelled_data().tensors.items()}
        ),
        finite={"class_labels": range(3)},
    )
    with torch.no_grad():
        few(x, t, y)
    assert few.report["unseen_values"] == {"class_labels": {"4": 1}}
    few.recipe["unseen"] = "error"
    with pytest.raises(
        TFMQError, match=r"class_labels=4: not among the 3 values declared finite; its neighbours are 2"
    ):
        few(x, t, y)


def test_labels_in_the_data_that_were_not_declared_are_refused():
    gm, data = prepared(finite={"class_labels": range(3)})
    with pytest.raises(
        TFMQError, match=r"values of 'class_labels' \[3, 4\] are in the data but not in the schedule of 3"
    ):
        tfmq_fx.calibrate(gm, data)


@pytest.mark.parametrize(
    ("finite", "words"),
    [
        ({"labels": range(3)}, "finite='labels': the graph has no such input; its inputs are class_labels"),
        ({"class_labels": []}, r"finite\['class_labels'\]: expected a list \(1-D\) of at least one value"),
        ({"class_labels": [1, 1]}, r"finite\['class_labels'\]: found repeated values"),
        (
            {"class_labels": [[1, 2]]},
            r"each value has shape \(2,\), but one sample of this input has shape \(\)",
        ),
        ({"class_labels": [float("nan")]}, "found NaN"),
    ],
)
def test_bad_declarations_are_refused(finite, words):
    with pytest.raises(TFMQError, match=words):
        prepared(finite=finite)


def test_nested_inputs_size_ids_and_pooled_text(tmp_path):
    network, data = make(Sized), sized_data()
    ids = torch.tensor([[8.0, 8.0], [6.0, 8.0]])
    q = tfmq_fx.quantize(network, RECIPE, calibration=data, finite={"added_cond_kwargs_time_ids": ids})
    assert q.report["temporal_block"]["keys"] == {
        "linear_2": ["timestep", "added_cond_kwargs_text_embeds", "added_cond_kwargs_time_ids"]
    }
    reasons = {n["reason"] for n in q.report["notes"]}
    assert (
        "one scale per timestep over sampled values: depends on added_cond_kwargs_text_embeds, not declared finite"
        in reasons
    )
    assert (
        "one scale over sampled values: depends on added_cond_kwargs_text_embeds, not declared finite"
        in reasons
    )
    x, t, text = torch.randn(2, 1, 6, 6), torch.tensor([0, 900]), torch.randn(2, 3, 6)
    added = {"text_embeds": torch.randn(2, 8), "time_ids": ids}
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    with torch.no_grad():
        expected = network(x, t, text, added, return_dict=False)[0]
        (got,) = loaded(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)
    assert (got - expected).square().mean() < 0.02 * expected.square().mean()
    with pytest.raises(TFMQError, match="'added_cond_kwargs_time_ids' is missing"):
        loaded(x, t, text, added_cond_kwargs={"text_embeds": added["text_embeds"]}, return_dict=False)
    with pytest.raises(
        TFMQError, match="'added_cond_kwargs_image_embeds' was None when the network was captured"
    ):
        loaded(x, t, text, added_cond_kwargs={**added, "image_embeds": torch.randn(2, 2)}, return_dict=False)
    with pytest.raises(TFMQError, match="'scale' was None when the network was captured"):
        loaded(x, t, text, added, scale=2.0, return_dict=False)


def test_finding_on_the_prepared_graph_gives_the_same_features():
    gm, _ = prepared(finite={"class_labels": range(Labelled.classes)})
    plain = tfmq_fx.capture(make(Labelled), labelled_data().arguments(slice(0, 2)))
    assert temporal_of(gm).features == find_temporal(plain).features
    assert temporal_of(gm).feature_keys == find_temporal(plain).feature_keys


def test_a_thousand_classes_are_walked_in_pieces():
    class Many(Labelled):
        classes = 1000

    data = labelled_data()
    data.tensors["class_labels"] = torch.arange(60) * 16
    gm = tfmq_fx.capture(make(Many), data.arguments(slice(0, 2)))
    gm = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS, finite={"class_labels": range(1000)})
    tfmq_fx.reconstruct(tfmq_fx.calibrate(gm, data), data)
    assert {o.num_keys for _, o in observers(gm) if isinstance(o, TemporalObserver)} == {10, 10_000}
    assert all(o.seen.all() for _, o in observers(gm) if isinstance(o, TemporalObserver))
    temporal = state_of(gm).reconstruction[0]
    assert temporal.error < temporal.error_nearest


def test_strict_refuses_a_coarser_key():
    with pytest.raises(
        TFMQError,
        match=r"strict: 1 deviation\(s\) from the recipe: silu\w*: one scale per timestep .* not declared finite",
    ):
        tfmq_fx.quantize(make(Labelled), RECIPE, calibration=labelled_data(), strict=True)
    finite = {"class_labels": range(Labelled.classes)}
    tfmq_fx.quantize(make(Labelled), RECIPE, calibration=labelled_data(), finite=finite, strict=True)
