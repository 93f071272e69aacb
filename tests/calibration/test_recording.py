"""Rows recorded through a pipeline: any scheduler, any arguments, the cache, memory."""

import diffusers
import pytest
import torch

from benchmarks.networks.pipelines import PIPELINES, PROMPTS, saved
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.calls import recorded
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.demo import embedded_pipeline

ENTRIES = {e.name: e for e in PIPELINES}
# diffusers' own, on this torch and numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def test_recording_keeps_one_trajectory_per_sample():
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    data = CalibrationSet.record(pipe, num_samples=5, num_inference_steps=4, seed=3, batch_size=2)
    assert len(data) == 20
    assert data.timesteps.tolist() == [750, 500, 250, 0]
    assert data.tensors["sample"].shape == (20, 1, 16, 16)
    again = CalibrationSet.record(pipe, num_samples=5, num_inference_steps=4, seed=3, batch_size=2)
    assert torch.equal(again.tensors["sample"], data.tensors["sample"])
    assert not pipe.unet._forward_pre_hooks


def test_recording_nothing_is_refused():
    with pytest.raises(TFMQError, match="must be positive"):
        CalibrationSet.record(embedded_pipeline(), num_samples=0, num_inference_steps=4)


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
    with pytest.raises(TFMQError, match=r"0\.bin: has \d+ bytes, but \d+ are expected; remove its folder"):
        CalibrationSet.record(sd, cache=tmp_path, **settings)
    (folder / "rows.json").write_text("{}")
    with pytest.raises(TFMQError, match="is not a readable recording"):
        CalibrationSet.record(sd, cache=tmp_path, **settings)


def test_rows_beyond_the_memory_limit_are_mapped_and_the_same(sd):
    settings = {"num_samples": 4, "num_inference_steps": 2, "batch_size": 2, "prompt": PROMPTS, **TEXT}
    plain = CalibrationSet.record(sd, **settings)
    mapped = CalibrationSet.record(sd, max_memory=1000, **settings)
    assert all(torch.equal(x, mapped.tensors[n]) for n, x in plain.tensors.items())
    assert torch.equal(mapped.spread(5, seed=1).tensors["sample"], plain.spread(5, seed=1).tensors["sample"])
