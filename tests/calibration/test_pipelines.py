"""The network within a pipeline, and how the pipeline is called."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, saved, unet_2d
from tests.helpers.nearest import recipe
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.pipelines import (
    denoiser,
    few_steps,
    prompts_for,
    run_pipeline,
    usual_steps,
    whole_lists,
)
from tfmq_fx.calibration.prompts import PROMPTS
from tfmq_fx.evaluation.sampling import sample

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


class Adapted:
    """A pipeline with prompts, two adapters, layers to skip, and steps left out by `strength`; it returns `name`."""

    def __init__(self, name="images"):
        self.name, self.calls = name, []

    def __call__(
        self, prompt, negative_prompt=None, adapters=None, skip=None, strength=1.0, num_inference_steps=4,
        num_images_per_prompt=1, output_type="pil",
    ):  # fmt: skip
        assert output_type == "np"
        self.calls.append((prompt, adapters, skip))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if isinstance(negative_prompt, list) and len(negative_prompt) != len(prompts):
            raise ValueError("as many negative prompts as prompts")
        if adapters is not None and len(adapters) != 2:
            raise ValueError("one value for each of two adapters")
        if int(strength * num_inference_steps) == 0:
            raise RuntimeError("no steps")
        return {self.name: torch.zeros(len(prompts) * num_images_per_prompt, 8, 8, 3).numpy()}


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [
        ({"prompt": ["a", "b", "c"]}, set()),
        ({"prompt": ["a"], "negative_prompt": ["d"]}, set()),
        ({"prompt": ["a", "b"], "negative_prompt": ["d"]}, set()),
        ({"prompt": ["a", "b"], "adapters": [1.0, 0.5]}, {"adapters"}),
        ({"prompt": "a", "adapters": [1.0, 0.5], "skip": [7]}, {"adapters", "skip"}),
        ({"prompt": list("abcdefgh"), "skip": [*range(9)]}, {"skip"}),
        ({"prompt": ["a"], "adapters": [1.0, 0.5], "strength": 0.2, "num_inference_steps": 20}, {"adapters"}),
        ({"prompt": ["a", "b"], "skip": (7, 8)}, set()),
        ({"prompt": "a"}, set()),
    ],
)
def test_the_pipeline_tells_which_lists_are_one_value_per_sample(arguments, whole):
    assert whole_lists(Adapted(), arguments) == whole


class Moving:
    """A pipeline that draws one video after another, whatever number it is asked for."""

    def __call__(self, video, weights, prompt, num_inference_steps=4, num_videos_per_prompt=3):  # noqa: ARG002
        if len(video) != 6 or len(prompt) > 1:
            raise ValueError("as many frames as in training, and one prompt")
        return {"frames": [video]}


def test_lists_with_which_a_pipeline_draws_its_only_sample_are_whole():
    given = {"video": [*range(6)], "weights": [0.5, 1.0], "prompt": ["a", "b"]}
    assert whole_lists(Moving(), given) == {"video", "weights"}


def test_whole_lists_and_tuples_reach_the_pipeline_as_they_are():
    pipe = Adapted()
    given = {"prompt": ["a", "b", "c"], "adapters": [1.0, 0.5], "skip": (7, 8, 9)}
    run_pipeline(pipe, 2, first=2, **given)
    assert pipe.calls[-1] == (["c", "a"], [1.0, 0.5], (7, 8, 9))


def test_pictures_are_asked_of_a_pipeline_that_has_none():
    with pytest.raises(
        TFMQError, match="Adapted returns frames and no images; its calls can be recorded, but"
    ):
        run_pipeline(Adapted("frames"), 2, prompt="a")


def test_short_runs_grow_up_to_the_steps_asked_for():
    assert few_steps(1) == [1]
    assert few_steps(2) == [2]
    assert few_steps(20) == [2, 4, 8, 16, 20]


class Wrapper(nn.Module):
    """It passes everything on, and may hold more than it calls."""

    def __init__(self, module, **more):
        super().__init__()
        self.module = module
        for name, other in more.items():
            self.add_module(name, other)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapped_network_has_the_arguments_of_what_is_in_it(sd):
    wrapped = Wrapper(sd.unet)
    assert denoiser(SimpleNamespace(components={"vae": sd.vae, "unet": wrapped})) is wrapped


def test_a_wrapper_with_unknown_arguments_is_named_with_the_way_out(sd):
    two = SimpleNamespace(components={"vae": sd.vae, "unet": Wrapper(sd.unet, scale=nn.Linear(1, 1))})
    with pytest.raises(
        TFMQError, match=r"'unet' is wrapped in a Wrapper.*; set pipe.unet = pipe.unet.module\."
    ):
        denoiser(two)


def test_without_a_prompt_ours_are_used_and_said(sd, caplog):
    assert len(set(PROMPTS)) == 64
    settings = {"num_samples": 3, "num_inference_steps": 1, "height": 16, "width": 16}
    own = CalibrationSet.record(sd, **settings)
    assert "no prompt is given, so 64 of tfmq_fx's own are used" in caplog.text
    caplog.clear()
    given = CalibrationSet.record(sd, **settings, prompt=list(PROMPTS[:3]))
    assert "no prompt is given" not in caplog.text
    name = "encoder_hidden_states"
    assert torch.equal(own.tensors[name], given.tensors[name])
    assert not given.note
    recipe = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    notes = tfmq_fx.quantize(sd, recipe, calibration=own, strict=True).report["notes"]
    assert {"name": "calibration", "reason": own.note, "coarser": False} in notes


def test_a_pipeline_without_prompts_gets_none(pipe):
    assert prompts_for(pipe, {}) == {}
    assert prompts_for(pipe, {"prompt_embeds": torch.zeros(1)}) == {}


class Combined(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that calls its network through another pipeline in it, as StableCascadeCombinedPipeline does."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.inner_pipe = diffusers.DDPMPipeline(unet, scheduler)

    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="np"):
        return self.inner_pipe(batch_size, generator, num_inference_steps, output_type)


def test_a_combined_pipeline_has_its_network_in_several_places():
    network = unet_2d()
    pipe = Combined(network, diffusers.DDPMScheduler())
    data = CalibrationSet.record(pipe, num_samples=4, num_inference_steps=2)
    q = tfmq_fx.quantize(pipe, recipe("w8a8"), calibration=data)
    (reason,) = [n["reason"] for n in q.report["notes"] if n["name"] == "pipeline"]
    assert (
        reason
        == "the pipeline holds its network as unet and as inner_pipe.unet: put the quantized one in each"
    )
    drawn = [sample(pipe, n, num_samples=2, num_inference_steps=2, seed=0) for n in (None, q, None)]
    assert torch.equal(drawn[0], drawn[2])
    assert 0 < (drawn[0] - drawn[1]).abs().max() < 0.1
    assert not any(
        n["name"] == "pipeline"
        for n in tfmq_fx.quantize(network, recipe("w8a8"), calibration=data).report["notes"]
    )


def test_a_pipeline_that_takes_no_number_of_steps_is_asked_for_none():
    assert usual_steps(SimpleNamespace(__call__=lambda num_inference_steps: num_inference_steps)) == 50
    assert usual_steps(SimpleNamespace(__call__=lambda sigmas: sigmas)) is None
