"""The papers' calibration settings, each in small: their scheduler, their steps, their rows."""

import json
import sys

import diffusers
import pytest
import torch

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, PROMPTS, saved
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.presets import PRESETS, QuadraticDDIMScheduler
from tfmq_fx.cli import main

ENTRIES = {e.name: e for e in PIPELINES}
TEXT = {"prompt": PROMPTS, "height": 16, "width": 16}
CASES = {
    "ddim-cifar10": ("ddim", {}),
    "ldm-bedrooms": ("ldm", {}),
    "ldm-churches": ("ldm", {}),
    "ldm-celebahq": ("ldm", {}),
    "ldm-ffhq": ("ldm", {}),
    "ldm-imagenet": ("dit", {"class_labels": [1, 2]}),
    "sd14-coco": ("sd", TEXT),
    "sdxl": ("sdxl", TEXT),
}
# diffusers' own, on this torch and numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def test_every_preset_is_tried():
    assert CASES.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_preset_records_with_its_scheduler_and_gives_the_pipeline_its_own_back(name, tmp_path):
    which, arguments = CASES[name]
    pipe, preset = saved(ENTRIES[which], tmp_path), tfmq_fx.CalibrationPreset.named(name)
    own = pipe.scheduler
    data = preset.record(pipe, num_samples=2, num_inference_steps=5, num_rows=None, seed=3, **arguments)
    assert pipe.scheduler is own
    preset.with_scheduler(pipe)
    assert type(pipe.scheduler) is preset.scheduler
    pipe.scheduler.set_timesteps(5)
    assert set(data.timesteps.tolist()) == set(pipe.scheduler.timesteps.tolist())
    guided = preset.arguments.get("guidance_scale", 1.0) > 1
    assert data.conditional.float().mean() == (0.5 if guided else 1)
    few = preset.record(pipe, num_samples=2, num_inference_steps=5, num_rows=5, seed=3, **arguments)
    assert len(few) == 5
    assert len(few.timesteps) == len(data.timesteps)  # evenly over them


def test_what_a_preset_needs_is_named(tmp_path):
    pipe = saved(ENTRIES["sd"], tmp_path)
    with pytest.raises(TFMQError, match=r"calibration preset 'sd14-coco': give prompt="):
        tfmq_fx.CalibrationPreset.named("sd14-coco").record(pipe)
    with pytest.raises(TFMQError, match="calibration preset: 'sd14' is unknown; use one of sd14-coco"):
        tfmq_fx.CalibrationPreset.named("sd14")


def test_quadratic_ddim_follows_a_known_trajectory():
    """With the true noise every step is exact: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise."""
    scheduler = QuadraticDDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(100)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (
        torch.randn(2, 1, 4, 4, generator=generator).clamp(-1, 1),
        torch.randn(2, 1, 4, 4, generator=generator),
    )
    steps = scheduler.timesteps
    assert (int(steps[0]), len(steps.unique()), int((steps == 0).sum())) == (800, 96, 4)
    x = scheduler.add_noise(x0, noise, steps[:1])
    for t in steps:
        torch.testing.assert_close(x, scheduler.add_noise(x0, noise, t[None]), atol=1e-4, rtol=1e-4)
        x = scheduler.step(noise, t, x).prev_sample
    torch.testing.assert_close(x, x0, atol=0.02, rtol=0)  # set_alpha_to_one: after timestep 0 comes x0


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_quadratic_ddim_on_even_steps_is_ddim(eta):
    ours, theirs = QuadraticDDIMScheduler(), diffusers.DDIMScheduler()
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    ours.timesteps = theirs.timesteps
    x = y = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in theirs.timesteps:
        noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(int(t)))
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        x = ours.step(noise, t, x, eta=eta, generator=generators[0]).prev_sample
        y = theirs.step(noise, t, y, eta=eta, generator=generators[1]).prev_sample
        torch.testing.assert_close(x, y)


def test_the_command_line_takes_a_preset_and_captions(tmp_path, monkeypatch, capsys):
    pipe = saved(ENTRIES["sd"], tmp_path)
    file = tmp_path / "captions.json"
    file.write_text(
        json.dumps({"annotations": [{"image_id": i, "id": i, "caption": p} for i, p in enumerate(PROMPTS)]})
    )
    command = [
        "tfmq",
        "quantize",
        str(tmp_path / "q"),
        "--model",
        str(tmp_path / "pipe"),
        "--calibration",
        "sd14-coco",
    ]
    command += [
        "--recipe",
        "w8a8",
        "--iterations",
        "0",
        "--steps",
        "3",
        "--num-samples",
        "2",
        "--cache",
        str(tmp_path / "rows"),
    ]
    command += ["--argument", "height=16", "--argument", "width=16"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "error: calibration preset 'sd14-coco': give prompt=" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--captions", str(file)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    q = tfmq_fx.load(tmp_path / "q")
    pipe.scheduler.set_timesteps(3)
    assert set(q.timesteps.tolist()) == set(pipe.scheduler.timesteps.tolist())
    assert len(list((tmp_path / "rows").iterdir())) == 1
