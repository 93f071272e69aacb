"""Which rows have the condition, in every call: guidance of any kind, switched on and off on the way."""

import logging

import diffusers
import pytest
import torch
from torch import nn

import tfmq_fx
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.guidance import conditional_rows, conditions, near, without_guidance


def test_rows_of_the_same_sample_are_compared_up_to_bfloat16s_noise():
    prompts, other = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    noisy = prompts.bfloat16().float()
    assert near(torch.cat([other, noisy]), prompts).tolist() == [False] * 3 + [True] * 3
    assert near(noisy, torch.cat([prompts, other])).all()  # either of the other run's parts
    assert not near(noisy.flip(0), prompts).any()  # the same rows, of other samples
    assert not near(torch.randn(3, 8, 4), prompts).any()
    labels = torch.tensor([1, 2, 1000, 1000])
    assert near(labels, labels[:2]).tolist() == [True, True, False, False]


def test_a_sample_whose_prompt_is_the_negative_one_is_marked_as_the_others_of_its_part():
    prompts = torch.randn(2, 4)
    assert near(torch.stack([prompts[1], prompts[1], *prompts]), prompts).tolist() == [False] * 2 + [True] * 2


def test_what_changes_with_the_sample_or_by_chance_tells_nothing():
    text = torch.randn(2, 4)
    calls = [{"text": text, "residual": torch.randn(2, 4), "one": torch.ones(1)} for _ in range(3)]
    assert conditions(calls, ("text", "residual", "one")) == ("text", "one")


def test_a_tensor_of_one_row_for_all_is_compared_as_such():
    call = {"text": torch.tensor([[0.0], [1.0]]), "one": torch.ones(1, 2)}
    expected = {"text": torch.ones(1, 1), "one": torch.ones(1, 2)}
    assert conditional_rows([call], [2], expected).tolist() == [False, True]
    assert not conditional_rows([{}], [2], expected).any()


def test_guidance_is_switched_off_by_each_scale_then_by_all():
    takes = ("prompt", "guidance_scale", "true_cfg_scale", "guidance_rescale")
    found = list(without_guidance(takes, {"true_cfg_scale": 1.0}))
    assert found == [
        {"guidance_scale": 1.0},
        {"guidance_scale": 1.0, "true_cfg_scale": 1.0},
        {"guidance_scale": 0.0, "true_cfg_scale": 0.0},
    ]
    assert list(without_guidance(("prompt",), {})) == []


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(4, 8), nn.Conv2d(3, 3, 1)

    def forward(self, sample, timestep, labels, residual=None):  # noqa: ARG002
        return self.out(sample + self.embed(labels).mean() + (0 if residual is None else residual))


class Guided(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A loop that guides in one call or in two, from and up to some step, with another part or a third call."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt, num_inference_steps=4, generator=None, real_guidance_scale=5.0, start=0.0, stop=1.0, split=False,
        perturbed=False, third=False, residuals=False, on_above=1.0,
    ):  # fmt: skip
        x = torch.randn(len(prompt), 3, 4, 4, generator=generator)
        cond, none = torch.tensor(prompt)[:, None].expand(-1, 4), torch.zeros(len(prompt), 4)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            guided = real_guidance_scale > on_above and start <= i / num_inference_steps < stop
            parts = [none, cond] if guided else [cond]
            parts += [cond] if perturbed else []
            more = {"residual": torch.randn_like(x)} if residuals else {}
            calls = parts if split else [torch.cat(parts)]
            calls += [cond] if third and guided else []
            for labels in calls:
                many = len(labels) // len(x)
                given = {n: v.repeat(many, 1, 1, 1) for n, v in more.items()}
                new = self.unet(x.repeat(many, 1, 1, 1), t, labels, **given)[-len(x) :]
            x = self.scheduler.step(new, t, x, return_dict=False)[0]
        return {"latents": x}


def guided():
    return Guided(Labelled().eval(), diffusers.DDIMScheduler())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "uucc uucc uucc uucc"),
        ({"stop": 0.5}, "uucc uucc cc cc"),
        ({"start": 0.5}, "cc cc uucc uucc"),
        ({"split": True}, "uu cc uu cc uu cc uu cc"),
        ({"split": True, "stop": 0.5}, "uu cc uu cc cc cc"),
        ({"split": True, "start": 0.25, "stop": 0.75}, "cc uu cc uu cc cc"),
        ({"perturbed": True}, "uucccc uucccc uucccc uucccc"),
        ({"perturbed": True, "stop": 0.25}, "uucccc cccc cccc cccc"),
        ({"third": True, "stop": 0.5}, "uucc cc uucc cc cc cc"),
        ({"residuals": True, "stop": 0.5}, "uucc uucc cc cc"),
        ({"real_guidance_scale": 0.7, "on_above": 0.0}, "uucc uucc uucc uucc"),
        ({"real_guidance_scale": 1.0}, "cc cc cc cc"),
    ],
)
def test_marks_follow_each_call(arguments, expected, caplog):
    with caplog.at_level(logging.WARNING):
        data = CalibrationSet.record(
            guided(), num_samples=2, num_inference_steps=4, prompt=[1.0, 2.0], **arguments
        )
    assert "".join("uc"[mark] for mark in data.conditional.tolist()) == expected.replace(" ", "")
    assert not caplog.messages


def test_guidance_that_changes_nothing_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        data = CalibrationSet.record(guided(), num_samples=2, num_inference_steps=2, prompt=[0.0, 0.0])
    assert data.conditional.all()
    assert "cannot tell conditional from unconditional rows" in caplog.text


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        (
            torch.ones(3, dtype=torch.bool),
            r"conditional is torch.bool \(3,\), but .* each of the 2 rows, \(2,\)",
        ),
        (torch.ones(2), r"conditional is torch.float32 \(2,\)"),
        ([True, False], "conditional is list"),
    ],
)
def test_marks_that_do_not_fit_the_rows_are_refused(marks, words):
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.CalibrationSet(
            {"sample": torch.zeros(2, 3), "timestep": torch.zeros(2)}, {}, "timestep", conditional=marks
        )
