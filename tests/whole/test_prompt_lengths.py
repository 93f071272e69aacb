"""Prompts of different lengths: padded to the longest of a call, with a mask in some calls only, and positions of their own."""

import dataclasses
import functools

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.components import TEXT, arguments, make
from benchmarks.networks.small import sinusoid
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet

PROMPTS = ["a cat", "a red bird on a tree", "houses", "a dog and a cat"]
# Some six layers of 8 bits whose ranges were observed at other prompts.
BOUND = 0.07
NEAREST = dataclasses.replace(
    tfmq_fx.Recipe.preset("w8a8"), reconstruction=tfmq_fx.Reconstruction(method="nearest")
)


class Words(nn.Module):
    """Attends to the tokens that a mask marks, or to all, at positions that the pipeline gives."""

    def __init__(self, meaning=0.0):
        super().__init__()
        self.time, self.emb = nn.Linear(8, 16), nn.Linear(16, 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        self.text, self.join = nn.Linear(6, 8), nn.Linear(8, 4)
        self.meaning = meaning  # of a mask that is left out

    def forward(self, sample, timestep, words, positions, mask=None):
        length = int(words.shape[1])
        h = self.conv1(sample) + self.emb(F.silu(self.time(sinusoid(timestep, 8))))[:, :, None, None]
        tokens = F.silu(self.text(words) + sinusoid(positions.float(), 8)[:length])
        if mask is None:
            pooled = tokens.mean(1) + self.meaning
        else:
            pooled = (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return (self.conv2(F.silu(h + self.join(pooled)[:, :, None, None])),)


class Pipe(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """Guided, with one call for the prompts and one for the negative prompt, as Qwen-Image's."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def encode(self, prompts):
        rows = [torch.randn(len(p), 6, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
        longest = max(map(len, rows))
        words = torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x in rows])
        mask = torch.tensor([[i < len(x) for i in range(longest)] for x in rows])
        given = {"words": words, "positions": torch.arange(longest)}
        return given if mask.all() else {**given, "mask": mask}

    @torch.no_grad()
    def __call__(
        self, prompt, negative_prompt="ugly", num_inference_steps=3, guidance_scale=3.0, generator=None
    ):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        given, negative = self.encode(prompt), self.encode([negative_prompt] * len(prompt))
        x = torch.randn(len(prompt), 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            each = t.expand(len(prompt))
            noise = self.unet(x, each, **given)[0]
            if guidance_scale > 1:
                other = self.unet(x, each, **negative)[0]
                noise = other + guidance_scale * (noise - other)
            x = self.scheduler.step(noise, t, x).prev_sample
        return diffusers.ImagePipelineOutput(images=x)


def pipeline(network=None):
    torch.manual_seed(0)
    return Pipe((network or Words()).eval(), diffusers.DDIMScheduler(clip_sample=False))


def record(pipe, **more):
    return CalibrationSet.record(pipe, num_samples=4, num_inference_steps=3, prompt=PROMPTS, **more)


@functools.cache
def quantized(batch_size):
    pipe = pipeline()
    return tfmq_fx.quantize(pipe, NEAREST, calibration=record(pipe, batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [3, 4])
def test_rows_are_padded_and_what_a_call_leaves_out_has_a_stand_in(batch_size):
    data = record(pipeline(), batch_size=batch_size)
    assert data.tensors["words"].shape == (24, 20, 6)
    assert data.row_sizes.of["words"][:, 0].unique().tolist() == ([4, 15, 20] if batch_size == 3 else [4, 20])
    assert data.tensors["mask"].dtype == torch.bool
    assert data.stand_ins["mask"].value == 1
    assert [len(x) for x in data.row_sizes.values["positions"]] == (
        [20, 4, 15] if batch_size == 3 else [20, 4]
    )
    assert data.conditional.tolist().count(False) == 12
    for rows in data.groups(64):
        given = data.arguments(rows)
        assert given["words"].shape[1] == given["mask"].shape[1] == len(given["positions"])


@pytest.mark.parametrize("batch_size", [3, 4])
@torch.no_grad()
def test_a_quantized_network_draws_other_prompts(batch_size, tmp_path):
    q, pipe = quantized(batch_size), pipeline()
    network = pipe.unet
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    for prompts in (["two"], ["a", "many more words than there were in calibration"], ["same", "long"]):

        def drawn(unet, prompts=prompts):
            pipe.unet = unet
            return pipe(prompts, generator=torch.Generator().manual_seed(1)).images

        expected, found = drawn(network), drawn(q)
        assert 1e-5 < (found - expected).norm() / expected.norm() < BOUND
        assert torch.equal(drawn(loaded), found)


@torch.no_grad()
def test_prompts_one_at_a_time_have_a_mask_too():
    """No prompt of a call with one is padded, so the pipeline never gives it one; a trial with two samples shows it."""
    data = record(pipeline(), batch_size=1)
    assert data.tensors["mask"].sum(1).unique().tolist() == [4, 5, 6, 15, 20]
    q, network, x, t = quantized(1), pipeline().unet, torch.randn(2, 1, 8, 8), torch.tensor([0, 333])
    words, at, mask = torch.randn(2, 7, 6), torch.arange(7), torch.arange(7) < torch.tensor([[4], [7]])
    for given in ((words, at), (words, at, mask)):
        expected = network(x, t, *given)[0]
        assert (q(x, t, *given)[0] - expected).norm() / expected.norm() < BOUND


@torch.no_grad()
def test_presets_choose_and_reconstruct_on_all_lengths():
    """4 bits by GPTQ and tuning, on six layers."""
    pipe = pipeline()
    network, small = pipe.unet, tfmq_fx.Recipe.preset("w4a8")
    small = dataclasses.replace(
        small, reconstruction=dataclasses.replace(small.reconstruction, tune_iterations=5)
    )
    q = tfmq_fx.quantize(pipe, small, calibration=record(pipe, batch_size=3))
    words, at = torch.randn(2, 9, 6), torch.arange(9)
    expected = network(torch.ones(2, 1, 8, 8), torch.tensor([0, 333]), words, at)[0]
    found = q(torch.ones(2, 1, 8, 8), torch.tensor([0, 333]), words, at)[0]
    assert (found - expected).norm() / expected.norm() < 0.3
    assert any("as if it were 1 everywhere" in note["reason"] for note in q.report["notes"])


def test_the_cache_keeps_it(tmp_path):
    first, again = (record(pipeline(), batch_size=3, cache=tmp_path) for _ in range(2))
    for a in (first, again):
        assert a.stand_ins == first.stand_ins
        assert torch.equal(a.row_sizes.kinds, first.row_sizes.kinds)
        assert all(
            torch.equal(x, y)
            for x, y in zip(a.row_sizes.values["positions"], first.row_sizes.values["positions"], strict=True)
        )
    assert torch.equal(again.tensors["words"], record(pipeline(), batch_size=3).tensors["words"])


def test_a_mask_whose_absence_means_something_else_is_refused():
    with pytest.raises(TFMQError, match="'mask' is given in call 1 of the network and not in call 2"):
        record(pipeline(Words(meaning=1.0)), batch_size=4)


class FixedWords(Words):
    """Has embeddings for its positions, of as many tokens as the shorter prompt has."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, sample, timestep, words, positions, mask=None):
        table = self.table if words.shape[1] == 4 else self.table.mean()
        return super().forward(sample, timestep, words + table, positions, mask)


def test_a_graph_of_one_length_is_refused_before_it_is_quantized():
    pipe = pipeline(FixedWords())
    with pytest.raises(
        TFMQError, match=r"rows of other sizes than those of the capture \(words \(\d+, 6\), mask"
    ):
        tfmq_fx.quantize(pipe, NEAREST, calibration=record(pipe, batch_size=4))


@torch.no_grad()
def test_prompts_for_another_number_of_rows_are_refused_and_one_is_that_of_all():
    """The graph's views would give rows the tokens of others."""
    q, x, t = quantized(4), torch.randn(2, 1, 8, 8), torch.tensor([0, 333])
    words, at = torch.randn(1, 6, 6), torch.arange(6)
    assert torch.equal(q(x, t, words, at)[0], q(x, t, words.repeat(2, 1, 1), at)[0])
    with pytest.raises(
        TFMQError, match="'words' has 3 entries in its first dimension for a batch of 2; it must have 2"
    ):
        q(x, t, words.repeat(3, 1, 1), at)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@torch.no_grad()
def test_qwen_image_is_quantized_for_prompts_of_any_length(tmp_path):
    """Its pipeline leaves the mask out where no prompt of a call is padded; its network turns the length into a number."""
    torch.manual_seed(0)
    pipe = make(diffusers.QwenImagePipeline, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    network = pipe.transformer

    def embeds(prompt, *_args, **_kwargs):
        rows = [torch.randn(len(p), TEXT, generator=torch.Generator().manual_seed(len(p))) for p in prompt]
        mask = torch.tensor([[i < len(x) for i in range(max(map(len, rows)))] for x in rows]).long()
        return torch.stack([F.pad(x, (0, 0, 0, mask.shape[1] - len(x))) for x in rows]), mask

    pipe._get_qwen_prompt_embeds = lambda prompt, *_: embeds([prompt] if isinstance(prompt, str) else prompt)
    given = {n: x for n, x in arguments(pipe).items() if "prompt" not in n} | {"max_sequence_length": 64}
    given |= {"negative_prompt": "ugly", "true_cfg_scale": 4.0, "num_inference_steps": 2}
    steps = given.pop("num_inference_steps")
    data = CalibrationSet.record(
        pipe, num_samples=2, num_inference_steps=steps, prompt=["a cat", "a red bird"], **given
    )
    q = tfmq_fx.quantize(pipe, NEAREST, calibration=data)

    def drawn(unet):
        pipe.transformer = unet
        return pipe(
            ["birds", "something else"], generator=torch.Generator().manual_seed(1), num_inference_steps=steps,
            output_type="pt", **given,
        ).images  # fmt: skip

    expected, found = drawn(network), drawn(q)
    assert 0 < (found - expected).norm() / expected.norm() < BOUND
