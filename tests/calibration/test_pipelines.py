"""The network within a pipeline, and how the pipeline is called."""

import json
from types import SimpleNamespace

import pytest

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, saved
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.pipelines import denoiser, run_pipeline

ENTRIES = {e.name: e for e in PIPELINES}
# diffusers' own, on this torch and numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return saved(ENTRIES["sd"], tmp_path_factory.mktemp("sd"))


def test_wrong_arguments_of_the_pipeline_are_named(pipe):
    with pytest.raises(TFMQError, match="DDPMPipeline takes no 'prompt'; it takes batch_size"):
        CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2, prompt="a cat")
    with pytest.raises(TFMQError, match="class_labels: the list is empty"):
        run_pipeline(pipe, 2, class_labels=[])


def test_of_several_components_with_a_timestep_one_is_named(sd):
    two = SimpleNamespace(components={"first": sd.unet, "second": sd.unet, "vae": sd.vae})
    with pytest.raises(
        TFMQError, match=r"2 components take a 'timestep' \(first, second\); name one with component="
    ):
        denoiser(two)
    assert denoiser(two, component="second") is sd.unet
    with pytest.raises(
        TFMQError, match="component: 'vae' takes no 'timestep'; components that do: first, second"
    ):
        denoiser(two, component="vae")


def test_captions_of_a_coco_file(tmp_path):
    file = tmp_path / "captions.json"
    notes = [
        {"image_id": 2, "id": 11, "caption": "a dog "},
        {"image_id": 1, "id": 12, "caption": "a later one"},
        {"image_id": 1, "id": 10, "caption": "a cat"},
    ]
    file.write_text(json.dumps({"annotations": notes}))
    assert tfmq_fx.coco_captions(file) == ["a cat", "a dog"]
    assert tfmq_fx.coco_captions(file, num=1, seed=0) == tfmq_fx.coco_captions(file, num=1, seed=0)
    with pytest.raises(TFMQError, match="has captions of 2 images, but num=3"):
        tfmq_fx.coco_captions(file, num=3)
    file.write_text("[]")
    with pytest.raises(TFMQError, match="not a COCO captions file"):
        tfmq_fx.coco_captions(file)
    with pytest.raises(TFMQError, match="cannot be read"):
        tfmq_fx.coco_captions(tmp_path / "none.json")
