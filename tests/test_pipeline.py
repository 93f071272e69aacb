"""quantize: what it needs, and what it reports."""

from functools import partial
from pathlib import Path

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, TinyUNet, calibration, captured, make
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.passes import PassManager, extract_temporal, find_temporal
from tfmq_fx.pipeline import stages
from tfmq_fx.settings import Settings


def test_the_report_lists_everything(tiny):
    report = tiny.report
    network = make(TinyUNet)
    layers = {layer["path"] for layer in report["layers"]}
    floats = {f["name"] for f in report["float"]}
    assert layers | floats >= {name for name, _ in network.named_parameters()}
    assert {"input of conv_in.weight", "input of conv_out.weight"} <= floats
    assert any("scaled_dot_product_attention" in f for f in floats)
    assert report["temporal_block"] == {
        "features": 2,
        "timesteps": 10,
        "finite": {},
        "keys": {"linear_2": ["timestep"], "linear_5": ["timestep"]},
    }
    assert len(report["errors_by_timestep"]) == 10
    assert report["sizes"]["quantized_weights"] + report["sizes"]["float_parameters"] == sum(
        p.numel() for p in network.parameters()
    )
    assert {r["kept"] for r in report["reconstruction"]} <= {"learned", "gptq", "nearest"}


def test_a_network_without_calibration_data_is_refused():
    with pytest.raises(TFMQError, match="a network alone has no trajectories"):
        tfmq_fx.quantize(make(TinyUNet))


def test_unknown_recipes_show_the_nearest():
    with pytest.raises(TFMQError, match="'w4a9' is not a preset; presets are w4a8"):
        tfmq_fx.quantize(make(TinyUNet), "w4a9", calibration=calibration())


def test_the_list_of_stages_is_what_quantize_runs():
    recipe = tfmq_fx.Recipe(reconstruction=FAST, smooth=0.5, maintain="cache", unseen="float")
    q = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration(), seed=3)
    gm = captured()
    temporal = find_temporal(gm)
    passes = stages(
        recipe,
        calibration=calibration(),
        temporal=temporal,
        block=extract_temporal(fresh(gm), temporal),
        settings=Settings(seed=3),
    )
    names = ["smooth", "prepare", "calibrate", "reconstruct", "maintain", "float_at_unseen", "convert"]
    assert PassManager(passes).names == names
    assert set(q.report["seconds"]) == {"capture", *names, "measure"}
    by_hand = PassManager(passes)(gm).graph_module
    assert tensors_of(by_hand).keys() == tensors_of(q.network).keys()
    for name, value in tensors_of(by_hand).items():
        assert torch.equal(value, tensors_of(q.network)[name]), name


def test_strict_checks_before_calibration_and_after_maintenance():
    passes = stages(
        tfmq_fx.Recipe(),
        calibration=calibration(),
        temporal=find_temporal(captured()),
        settings=Settings(strict=True),
    )
    names = PassManager(passes).names
    assert [i for i, name in enumerate(names) if name == "require_whole"] == [1, len(names) - 2]
    assert names[2] == "calibrate"


def test_a_recipe_that_keeps_the_float_block_needs_it():
    with pytest.raises(TFMQError, match="needs block=extract_temporal"):
        stages(tfmq_fx.Recipe(unseen="float"), calibration=calibration(), temporal=find_temporal(captured()))


def test_a_wrong_setting_is_refused_before_anything_is_captured():
    for setting, words in (({"seed": 0.5}, "seed: 0.5"), ({"finite": ["class_labels"]}, "finite: list")):
        with pytest.raises(TFMQError, match=words):
            tfmq_fx.quantize(None, calibration=calibration(), **setting)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": None}, "model: expected Module, found NoneType; give a loaded diffusers pipeline"),
        ({"model": "folder"}, "model: expected Module, found str"),
        ({"model": TinyUNet}, "model: expected Module, found the class TinyUNet"),
        ({"model": lambda x: x}, "model: expected Module, found function"),
        ({"recipe": {"weight_bits": 4}}, r"recipe: expected Recipe, found dict; .*Recipe\.from_json\(dict\)"),
        ({"recipe": Path("x.json")}, r"recipe: expected Recipe, found .*Path; .*Recipe\.read\(file\)"),
        ({"recipe": None}, "recipe: expected Recipe, found NoneType"),
        ({"recipe": "mine.json"}, r"'mine\.json' is not a preset; .*Recipe\.read\(file\)"),
        ({"calibration": {}}, r"calibration: expected CalibrationSet, found dict; .*from_tensors"),
        ({"calibration": []}, "calibration: expected CalibrationSet, found list"),
        ({"component": "unet"}, "component: 'unet' is for a pipeline, but a TinyUNet is given"),
    ],
)
@pytest.mark.parametrize("call", [tfmq_fx.quantize, partial(tfmq_fx.mixed_precision, max_bytes=1e6)])
def test_wrong_objects_are_refused_before_anything_is_captured(monkeypatch, given, words, call):
    monkeypatch.setattr("torch.export.export", None)
    arguments = {"model": make(TinyUNet), "recipe": "w4a8", "calibration": calibration(), **given}
    with pytest.raises(TFMQError, match=words):
        call(**arguments)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (3, "state: expected str or Path, found int; name a folder"),
        ("/proc/state", "/proc/state/state.json: cannot be written"),
        (__file__, r"test_pipeline\.py/state\.json: cannot be written"),
    ],
)
def test_a_state_that_cannot_be_written_is_refused_before_anything_is_captured(state, words):
    recipe = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))  # it needs no state
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.quantize(Unasked().eval(), recipe, calibration=calibration(), state=state)


class Unasked(torch.nn.Module):
    """A network that must not run."""

    def forward(self, sample, timestep):
        raise AssertionError(sample, timestep)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"timesteps": [1, 1]}, "timesteps: found repeated values"),
        ({"timesteps": TIMESTEPS[:-1]}, r"timesteps \[0\] are in the data but not in the schedule of 9"),
        (
            {"finite": {"labels": [1]}},
            "finite='labels': the calibration data have no tensor named 'labels'; found sample",
        ),
        ({"timesteps": [*TIMESTEPS.tolist(), 5, 7]}, r"no row has the timesteps 5, 7 of the schedule"),
    ],
)
def test_a_schedule_that_does_not_fit_the_data_is_refused_before_anything_is_captured(more, words):
    recipe = tfmq_fx.Recipe(keyed="all")
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.quantize(Unasked().eval(), recipe, calibration=calibration(), **more)


def test_quantizing_leaves_the_programs_random_numbers_alone():
    before = torch.get_rng_state()
    tfmq_fx.quantize(make(TinyUNet), tfmq_fx.Recipe(reconstruction=FAST), calibration=calibration())
    assert torch.equal(torch.get_rng_state(), before)
