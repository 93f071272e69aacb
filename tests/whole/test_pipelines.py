"""The papers' pipelines and the users': calibrate through the pipeline, quantize, save, load, sample, compare to float."""

import dataclasses
import json

import diffusers
import pytest
import torch

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, saved
from tfmq_fx.base.metrics import psnr
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.pipelines import denoiser
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
