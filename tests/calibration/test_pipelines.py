"""The papers' pipelines and the users': calibrate through the pipeline, quantize, save, load, sample, compare to float."""

import dataclasses
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, PROMPTS, saved
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.metrics import psnr
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.pipelines import denoiser, run_pipeline
from tfmq_fx.calibration.recording import recorded
from tfmq_fx.calibration.rows import Sink
from tfmq_fx.evaluation.sampling import sample

ENTRIES = {e.name: e for e in PIPELINES}
NEAREST = dataclasses.replace(
    tfmq_fx.Recipe.preset("w8a8"), reconstruction=tfmq_fx.Reconstruction(method="nearest")
)
STEPS = 4
# diffusers' own, on this torch and numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


# The same networks under another class of pipeline.
TWINS = ("ddim", "pixart-sigma")
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in TWINS else ()) for n in ENTRIES]


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    entry = ENTRIES[request.param]
    pipe = saved(entry, tmp_path_factory.mktemp(entry.name))
    data = CalibrationSet.record(
        pipe, num_samples=5, num_inference_steps=STEPS, batch_size=2, **entry.arguments
    )
    return entry, pipe, data, tfmq_fx.quantize(pipe, NEAREST, calibration=data, finite=entry.finite)


def draw(pipe, entry, network=None, seed=1):
    return sample(pipe, network, num_samples=3, num_inference_steps=STEPS, seed=seed, **entry.arguments)


def test_each_step_of_each_sample_is_a_row_or_two(case):
    entry, pipe, data, _ = case
    calls = STEPS + (entry.name == "sd")  # PLMS takes its second timestep twice
    assert len(data) == 5 * calls * (2 if entry.guided else 1)
    assert set(data.timesteps.tolist()) == set(_timesteps(pipe, entry))
    assert int(data.conditional.sum()) == 5 * calls


def _timesteps(pipe, entry):
    factor = 1000 if entry.name == "flux" else 1  # what FluxPipeline calls its network with
    return (
        torch.as_tensor(pipe.scheduler.timesteps) / factor if factor > 1 else pipe.scheduler.timesteps
    ).tolist()


def test_conditional_rows_are_those_of_an_unguided_run(case):
    entry, pipe, data, _ = case
    if not entry.guided:
        assert data.conditional.all()
        return
    plain = CalibrationSet.record(
        pipe, num_samples=5, num_inference_steps=2, **{**entry.arguments, "guidance_scale": 1.0}
    )
    names = [n for n in plain.tensors if n not in (plain.timestep, next(iter(plain.tensors)))]

    def conditions(found):
        return torch.stack(
            [torch.cat([found.tensors[n][i].flatten().float() for n in names]) for i in range(len(found))]
        )

    # Text encoders sum other batches in another order.
    near = torch.cdist(conditions(data), conditions(plain), p=1).amin(1) < 1e-2
    assert torch.equal(near, data.conditional)


def test_pictures_are_near_the_float_ones_and_the_same_after_saving(case, tmp_path):
    entry, pipe, _, q = case
    q.save_pretrained(tmp_path / "q")
    reference, images = draw(pipe, entry), draw(pipe, entry, tfmq_fx.load(tmp_path / "q"))
    assert torch.equal(images, draw(pipe, entry, q))
    # Random networks: their errors grow from step to step as no trained one's do. Pictures of other noise are the scale.
    other = draw(pipe, entry, seed=2)
    assert psnr(images, reference) > psnr(other, reference) + 10
    assert not torch.equal(images, reference)
    assert q.report["unseen_timesteps"] == {}


def test_the_pipeline_is_saved_and_read_with_its_quantized_network(case, tmp_path):
    entry, pipe, _, q = case
    (name,) = [n for n, m in pipe.components.items() if m is denoiser(pipe)]
    original = getattr(pipe, name)
    expected = draw(pipe, entry, q)
    setattr(pipe, name, q)
    try:
        pipe.save_pretrained(tmp_path / "pipe")
    finally:
        setattr(pipe, name, original)
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())[name] == [
        "tfmq_fx",
        "QuantizedModel",
    ]
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert isinstance(getattr(again, name), tfmq_fx.QuantizedModel)
    assert torch.equal(draw(again, entry), expected)
    # The same folder through the float network's own class.
    direct = type(original).from_pretrained(tmp_path / "pipe", subfolder=name)
    assert isinstance(direct, tfmq_fx.QuantizedModel)
    assert torch.equal(draw(pipe, entry, direct), expected)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return saved(ENTRIES["sd"], tmp_path_factory.mktemp("sd"))


TEXT = {"height": 16, "width": 16}


def test_prompts_are_taken_in_turn_over_batches(sd):
    data = CalibrationSet.record(
        sd, num_samples=4, num_inference_steps=2, batch_size=3, prompt=PROMPTS, guidance_scale=1.0, **TEXT
    )
    embeds = data.tensors["encoder_hidden_states"]
    last = embeds[-1]  # the fourth sample has the first prompt again
    assert torch.allclose(last, embeds[0])
    assert not torch.allclose(last, embeds[1])


def test_one_prompt_is_repeated(sd):
    data = CalibrationSet.record(sd, num_samples=3, num_inference_steps=2, prompt="a cat", **TEXT)
    assert len(data) == 3 * 3 * 2


SCHEDULERS = [
    "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_records_the_same_rows_again(sd, name):
    own = sd.scheduler
    sd.scheduler = getattr(diffusers, name).from_config(own.config)
    try:
        runs = [
            CalibrationSet.record(sd, num_samples=2, num_inference_steps=3, seed=5, prompt=PROMPTS, **TEXT)
            for _ in range(2)
        ]
        steps = {float(t) for t in sd.scheduler.timesteps}
    finally:
        sd.scheduler = own
    assert {float(t) for t in runs[0].timesteps} == steps
    assert all(torch.equal(x, runs[1].tensors[n]) for n, x in runs[0].tensors.items())
    assert runs[0].conditional.float().mean() == 0.5


def test_a_recording_is_read_from_the_cache_when_everything_is_equal(sd, tmp_path):
    settings = {"num_samples": 3, "num_inference_steps": 2, "prompt": PROMPTS, **TEXT}
    first = CalibrationSet.record(sd, cache=tmp_path, **settings)
    with recorded(sd.unet) as calls:
        again = CalibrationSet.record(sd, cache=tmp_path, **settings)
    assert calls == []
    assert all(torch.equal(x, again.tensors[n]) for n, x in first.tensors.items())
    assert torch.equal(first.conditional, again.conditional)
    plain = CalibrationSet.record(sd, **settings)
    assert all(torch.equal(x, again.tensors[n]) for n, x in plain.tensors.items())
    with recorded(sd.unet) as calls:
        CalibrationSet.record(sd, cache=tmp_path, **{**settings, "prompt": ["a dog"]})
    assert calls
    weight = sd.unet.conv_in.weight
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
        try:
            with recorded(sd.unet) as calls:
                CalibrationSet.record(sd, cache=tmp_path, **settings)
        finally:
            weight[0, 0, 0, 0] -= 1
    assert calls
    assert len(list(tmp_path.iterdir())) == 3


def test_a_cache_that_was_cut_short_is_named(sd, tmp_path):
    settings = {"num_samples": 2, "num_inference_steps": 2, "prompt": PROMPTS, **TEXT}
    CalibrationSet.record(sd, cache=tmp_path, **settings)
    (folder,) = tmp_path.iterdir()
    file = folder / "0.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(TFMQError, match=r"0\.bin: has \d+ bytes, \d+ are expected; remove its folder"):
        CalibrationSet.record(sd, cache=tmp_path, **settings)
    (folder / "rows.json").write_text("{}")
    with pytest.raises(TFMQError, match="not a recording that can be read"):
        CalibrationSet.record(sd, cache=tmp_path, **settings)


def test_rows_beyond_the_memory_limit_are_mapped_and_the_same(sd):
    settings = {"num_samples": 4, "num_inference_steps": 2, "batch_size": 2, "prompt": PROMPTS, **TEXT}
    plain = CalibrationSet.record(sd, **settings)
    mapped = CalibrationSet.record(sd, max_memory=1000, **settings)
    assert all(torch.equal(x, mapped.tensors[n]) for n, x in plain.tensors.items())
    assert torch.equal(mapped.spread(5, seed=1).tensors["sample"], plain.spread(5, seed=1).tensors["sample"])


def test_rows_of_different_sizes_are_refused(tmp_path):
    sink = Sink(tmp_path, 1e9)
    sink.append({"sample": torch.zeros(2, 4, 8, 8)})
    with pytest.raises(TFMQError, match=r"'sample' has rows of torch.float32 \(4, 12, 12\) after rows of"):
        sink.append({"sample": torch.zeros(2, 4, 12, 12)})
    with pytest.raises(TFMQError, match="some calls of the network have 'label' and some have not"):
        sink.append({"sample": torch.zeros(2, 4, 8, 8), "label": torch.zeros(2)})


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
    with pytest.raises(TFMQError, match="component: 'vae' takes no 'timestep'; only first, second does"):
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
    with pytest.raises(TFMQError, match="captions of 2 images, 3 were asked for"):
        tfmq_fx.coco_captions(file, num=3)
    file.write_text("[]")
    with pytest.raises(TFMQError, match="not a COCO captions file"):
        tfmq_fx.coco_captions(file)
    with pytest.raises(TFMQError, match="cannot be read"):
        tfmq_fx.coco_captions(tmp_path / "none.json")
