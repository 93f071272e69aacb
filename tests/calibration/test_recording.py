"""Rows recorded through a pipeline: any scheduler, any arguments, the cache, memory."""

import dataclasses

import diffusers
import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, PROMPTS, saved, t5_encoder, t5_tokenizer, unet_2d
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.calls import recorded
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.shapes import Shapes
from tfmq_fx.demo import embedded_pipeline

ENTRIES = {e.name: e for e in PIPELINES}
NEAREST = dataclasses.replace(
    tfmq_fx.Recipe.preset("w8a8"), reconstruction=tfmq_fx.Reconstruction(method="nearest")
)
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
    with pytest.raises(TFMQError, match="num_samples=0 must be a positive integer"):
        CalibrationSet.record(embedded_pipeline(), num_samples=0, num_inference_steps=4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_samples": 2.5}, "num_samples=2.5 must be a positive integer"),
        ({"num_inference_steps": "5"}, "num_inference_steps='5' must be a positive integer"),
        ({"seed": 2**70}, "must be an integer up to"),
        ({"generator": torch.Generator()}, "generator= is set by recording, one for each batch; give seed="),
    ],
)
def test_what_is_no_number_of_samples_is_refused_before_anything_is_drawn(given, words):
    with pytest.raises(TFMQError, match=words):
        CalibrationSet.record(embedded_pipeline(), **{"num_samples": 2, "num_inference_steps": 2, **given})


def test_a_network_is_no_pipeline():
    with pytest.raises(TFMQError, match="a UNet2DModel is no pipeline; give a diffusers pipeline"):
        CalibrationSet.record(embedded_pipeline().unet, num_samples=2, num_inference_steps=2)


def test_an_argument_that_a_pipeline_does_not_name_is_logged(sd, caplog):
    CalibrationSet.record(sd, num_samples=1, num_inference_steps=1, prompt="a cat", promt="a dog", **TEXT)
    assert "names no argument 'promt', and may ignore it" in caplog.text


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


class Loop(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A sampling loop that updates its sample in place, and returns latents only."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size=1,
        num_inference_steps=10,
        generator=None,
        in_place=True,
        scaled_steps=0,
        tokens=0,
        rows=None,
    ):
        x = torch.randn(batch_size, 3, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            more = {"class_labels": torch.zeros(batch_size)} if i < scaled_steps else {}
            given = t.expand(rows or batch_size, tokens) if tokens else t
            new = self.scheduler.step(self.unet(x, given, **more).sample, t, x, return_dict=False)[0]
            x = x.copy_(new) if in_place else new
        return {"latents": x}


class Unlabelled(nn.Module):
    """A UNet that takes class labels, and does nothing with them."""

    def __init__(self):
        super().__init__()
        self.unet = unet_2d()

    def forward(self, sample, timestep, class_labels=None):  # noqa: ARG002
        timestep = timestep.flatten()[0] if timestep.dim() else timestep
        return self.unet(sample, timestep)


def loop():
    return Loop(Unlabelled().eval(), diffusers.DDIMScheduler())


def test_a_loop_that_updates_in_place_is_recorded_step_by_step():
    pipe = loop()
    rows = [
        CalibrationSet.record(pipe, num_samples=3, num_inference_steps=5, in_place=i).tensors["sample"]
        for i in (True, False)
    ]
    assert torch.equal(*rows)
    assert len({x.numpy().tobytes() for x in rows[0]}) == 3 * 5


def test_an_argument_of_some_steps_only_is_refused():
    # The probe's steps have it, the recording's last do not.
    with pytest.raises(TFMQError, match=r"'class_labels' is given in calls 1 to 2 .* and not in call 3"):
        CalibrationSet.record(loop(), num_samples=3, num_inference_steps=4, scaled_steps=2)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_timestep_per_token_is_recorded_for_every_row(rows):
    given = {"num_samples": 3, "num_inference_steps": 2, "tokens": 4}
    data = CalibrationSet.record(loop(), rows=rows, **given)
    assert data.tensors["timestep"].shape == (6, 4)
    assert torch.equal(data.row_timesteps, data.timesteps.repeat_interleave(3))
    assert data.arguments(slice(0, 5))["timestep"].shape == (5, 4)


def test_timesteps_that_are_not_those_of_rows_are_refused():
    with pytest.raises(TFMQError, match=r"the timestep 'timestep' has shape \(2, 4\) in a call of 3 rows"):
        CalibrationSet.record(loop(), num_samples=3, num_inference_steps=2, tokens=4, rows=2)


def test_it_is_refused_before_anything_is_sampled():
    pipe, calls = loop(), []
    pipe.unet.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(TFMQError, match=r"'class_labels' is given in calls 1 to 5 .* and not in call 6"):
        CalibrationSet.record(pipe, num_samples=3, num_inference_steps=20, scaled_steps=5)
    assert len(calls) == 2 + 2  # one call of each kind, and a short run


class Alone(Loop):
    """A loop for one sample: for more, it fails, or gives its network one sample and as many labels as it is asked for."""

    def __call__(self, batch_size=1, num_inference_steps=10, generator=None, fails=True):
        if batch_size > 1 and fails:
            raise RuntimeError(f"{batch_size} samples for one picture")
        x = torch.randn(1, 3, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            new = self.unet(x, t, torch.zeros(batch_size)).sample
            x = self.scheduler.step(new, t, x, return_dict=False)[0]
        return {"latents": x}


@pytest.mark.parametrize("fails", [True, False])
def test_a_pipeline_for_one_sample_draws_one_at_a_time(fails, caplog):
    pipe = Alone(Unlabelled().eval(), diffusers.DDIMScheduler())
    data = CalibrationSet.record(pipe, num_samples=3, num_inference_steps=4, fails=fails)
    assert len(data) == 3 * 4 == len(data.tensors["sample"].flatten(1).unique(dim=0))
    assert "one at a time" in caplog.text or "one sample at a time" in caplog.text


@pytest.mark.parametrize("strength", [0.6, 0.3, 0.06])
def test_image_to_image_takes_the_steps_that_its_strength_leaves(sd, strength):
    parts = {
        **sd.components,
        "scheduler": diffusers.DDIMScheduler.from_config(sd.scheduler.config, clip_sample=False),
    }
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pictures = [torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)]
    data = CalibrationSet.record(
        pipe, num_samples=3, num_inference_steps=20, prompt=["a red cat"], image=pictures, strength=strength
    )
    assert len(data) == 3 * int(20 * strength) * 2
    assert data.conditional.float().mean() == 0.5


def test_controlnets_take_one_picture_each_and_leave_the_condition_visible(sd):
    nets = [
        diffusers.ControlNetModel.from_unet(sd.unet, conditioning_embedding_out_channels=(8, 16))
        for _ in range(2)
    ]
    for parameter in (p for net in nets for p in net.eval().parameters() if not p.any()):
        nn.init.normal_(parameter, std=0.1)
    parts = {
        **sd.components,
        "scheduler": diffusers.DDIMScheduler.from_config(sd.scheduler.config, clip_sample=False),
    }
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=nets, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    data = CalibrationSet.record(
        pipe, num_samples=3, num_inference_steps=2, component="unet", prompt=PROMPTS,
        image=[torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)], controlnet_conditioning_scale=[1.0, 0.5],
    )  # fmt: skip
    assert len(data) == 3 * 2 * 2
    assert data.conditional.float().mean() == 0.5
    assert data.tensors["mid_block_additional_residual"].std() > 0


def test_a_video_pipeline_is_recorded():
    tokenizer = t5_tokenizer()
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=1,
        rope_max_seq_len=32,
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=t5_encoder(len(tokenizer), 32), transformer=transformer.eval(), vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    data = CalibrationSet.record(
        pipe, num_samples=3, num_inference_steps=2, prompt=["a red cat", "a dog"], negative_prompt=["a dog"], height=16,
        width=16, num_frames=5, max_sequence_length=16,
    )  # fmt: skip
    assert data.tensors["hidden_states"].shape == (3 * 2 * 2, 16, 2, 2, 2)
    assert data.conditional.float().mean() == 0.5


def test_the_cache_knows_arrays_within_lists_by_their_values(sd, tmp_path):
    settings = {"num_samples": 1, "num_inference_steps": 1, "prompt": "a cat", "guidance_scale": 1.0, **TEXT}
    large = torch.zeros(3000)
    other = large.clone()
    other[1500] = 1  # printed alike
    for x in (large, other, large.clone()):
        CalibrationSet.record(
            sd,
            cache=tmp_path,
            callback_on_step_end_tensor_inputs=["latents"],
            cross_attention_kwargs={"x": x},
            **settings,
        )
    assert len(list(tmp_path.iterdir())) == 2


def test_a_table_with_as_many_entries_as_rows_by_chance_has_no_rows():
    """Two frames' rotary embedding in a call of two rows; in one of four it still has two."""

    def call(rows):
        return {"sample": torch.zeros(rows, 3), "angles": torch.zeros(2, 5), "timestep": torch.zeros(rows)}

    shapes = Shapes.of(call(2), 2, apart={"timestep"})
    assert shapes.shared == {}
    shapes.see([call(4)], [4])
    assert shapes.shared == {"angles": torch.Size([2, 5])}


def test_one_mask_for_all_rows_has_no_rows_but_one_number_that_changes_has():
    """In a call of one row, both seem to have rows."""

    def call(rows, scale):
        return {"sample": torch.zeros(rows, 3), "mask": torch.ones(1, 3), "scale": torch.full((1,), scale)}

    shapes = Shapes.of(call(1, 0.5), 1, apart={"timestep"})
    assert shapes.shared == {}
    shapes.see([call(4, 0.5), call(4, 0.7)], [4, 4])
    assert shapes.shared == {"mask": torch.Size([1, 3])}


class Clips(diffusers.DDPMPipeline):  # type: ignore[misc]
    """Its network takes the condition of each clip once for every one of three frames."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2):
        clips = torch.randn(batch_size, 3, 4, generator=generator)
        words = torch.randn(batch_size, 5, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            clips = clips - 0.1 * self.unet(clips, t, words.repeat_interleave(3, 0))
        return {"frames": clips.numpy()}


class ClipNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.words, self.out = nn.Linear(1, 4), nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep, words):
        emb = self.time((timestep / 1000).float().reshape(-1, 1)).expand(sample.shape[0], -1)
        return self.out(sample + emb[:, None] + self.words(words).unflatten(0, sample.shape[:2]))


def test_a_condition_for_every_frame_is_recorded_once_and_given_as_the_network_takes_it():
    torch.manual_seed(0)
    pipe = Clips(ClipNetwork().eval(), diffusers.DDPMScheduler())
    data = CalibrationSet.record(pipe, num_samples=4, num_inference_steps=2)
    assert data.tensors["words"].shape == (8, 5)
    assert data.rows(torch.arange(3)).arguments(slice(1, 3))["words"].shape == (6, 5)
    q = tfmq_fx.quantize(pipe, NEAREST, calibration=data)
    x, t, words = torch.randn(5, 3, 4), torch.tensor(500), torch.randn(5, 5).repeat_interleave(3, 0)
    assert (q(x, t, words) - pipe.unet(x, t, words)).abs().max() < 0.1  # 8 bits of values up to 4


class Controlled(diffusers.DDPMPipeline):  # type: ignore[misc]
    """Its network takes what another one makes of each frame: the frames of all clips as one dimension, clips first or last."""

    last = False

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2):
        clips = torch.randn(batch_size, 3, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            more = (clips.transpose(0, 1) if self.last else clips).flatten(0, 1).sin()
            clips = clips - 0.1 * self.unet(clips, t, more)
        return {"frames": clips.numpy()}


class ControlledNetwork(ClipNetwork):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, sample, timestep, frames):
        clips, count, _ = sample.shape
        frames = (
            frames.unflatten(0, (count, clips)).transpose(0, 1)
            if self.last
            else frames.unflatten(0, (clips, count))
        )
        emb = self.time((timestep / 1000).float().reshape(-1, 1)).expand(clips, -1)
        return self.out(sample + emb[:, None] + frames * frames.roll(1, dims=1))


def test_what_each_frame_of_a_clip_has_is_recorded_with_its_clip(tmp_path):
    torch.manual_seed(0)
    pipe = Controlled(ControlledNetwork(last=False).eval(), diffusers.DDPMScheduler())
    data = CalibrationSet.record(pipe, num_samples=4, num_inference_steps=2, cache=tmp_path)
    assert data.tensors["frames"].shape == (8, 3, 4)
    assert torch.equal(data.tensors["frames"], data.tensors["sample"].sin())
    again = CalibrationSet.record(pipe, num_samples=4, num_inference_steps=2, cache=tmp_path)
    chosen = again.rows(torch.tensor([6, 1])).arguments(slice(0, 2))
    assert torch.equal(chosen["frames"], data.tensors["frames"][[6, 1]].flatten(0, 1))
    q = tfmq_fx.quantize(pipe, NEAREST, calibration=data)
    x, t, frames = torch.randn(5, 3, 4), torch.tensor(500), torch.randn(15, 4).sin()
    assert (q(x, t, frames) - pipe.unet(x, t, frames)).abs().max() < 0.1  # 8 bits of values up to 4


def test_frames_of_which_a_network_mixes_the_clips_are_refused():
    torch.manual_seed(0)
    pipe = Controlled(ControlledNetwork(last=True).eval(), diffusers.DDPMScheduler())
    pipe.last = True
    with pytest.raises(TFMQError, match="'frames' has no rows, but is a Tensor of shape"):
        CalibrationSet.record(pipe, num_samples=4, num_inference_steps=2)


class Sized(diffusers.DDPMPipeline):  # type: ignore[misc]
    """Its network tells a size, a tuple, from a list of several."""

    def computed(self, x, t):
        return self.unet(x, t, [(2, 3)])

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2):
        x = torch.randn(batch_size, 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = x - 0.1 * self.computed(x, t)
        return {"frames": x.numpy()}


class SizedNetwork(ClipNetwork):
    def forward(self, sample, timestep, sizes):
        (height, width) = sizes[0] if isinstance(sizes[0], tuple) else sizes[0][0]
        emb = self.time((timestep / 1000).float().reshape(-1, 1)).expand(sample.shape[0], -1)
        return self.out(sample.unflatten(1, (height, width)).flip(1).flatten(1, 2) + emb[:, None])


def test_tuples_stay_tuples(tmp_path):
    pipe = Sized(SizedNetwork().eval(), diffusers.DDPMScheduler())
    for _ in range(2):  # the second one is read from the cache
        data = CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2, cache=tmp_path)
        assert data.arguments(slice(0, 1))["sizes"] == [(2, 3)]


class Illustrated(Sized):
    """Its network needs a list of pictures and where they are, also if there are none."""

    def computed(self, x, t):
        return self.unet(x, t, [], {})


class IllustratedNetwork(ClipNetwork):
    def forward(self, sample, timestep, pictures, places):
        pictures = [x.tanh() for x in pictures]
        emb = self.time((timestep / 1000).float().reshape(-1, 1)).expand(sample.shape[0], -1)
        return self.out(sample + sum(pictures[i].mean() for i in places) + emb[:, None])


def test_a_network_gets_the_empty_lists_that_it_needs(tmp_path):
    pipe = Illustrated(IllustratedNetwork().eval(), diffusers.DDPMScheduler())
    for _ in range(2):  # the second one is read from the cache
        data = CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2, cache=tmp_path)
        assert data.constants == {"pictures": [], "places": {}}
    q = tfmq_fx.quantize(pipe, NEAREST, calibration=data)
    x, t = torch.randn(2, 6, 4), torch.tensor(500)
    assert (q(x, t, [], {}) - pipe.unet(x, t, [], {})).abs().max() < 0.1
    q.save_pretrained(tmp_path / "saved")
    assert torch.equal(tfmq_fx.load(tmp_path / "saved")(x, t, [], {}), q(x, t, [], {}))
    with pytest.raises(TFMQError, match="pictures"):
        q(x, t, [torch.randn(3)], {0: 1})


class OfLayers(Sized):
    """Its network takes what is added to certain layers, and returns what each layer makes, by the layers' numbers."""

    def computed(self, x, t):
        return self.unet(x, t, {2: x.flip(1), 0: x})[3]


class LayersNetwork(ClipNetwork):
    def forward(self, sample, timestep, added):
        emb = self.time((timestep / 1000).float().reshape(-1, 1)).expand(sample.shape[0], -1)[:, None]
        made = {}
        for i in range(4):
            sample = made[i] = self.out(sample + emb + added.get(i, 0))
        return {3: made[3], 1: made[1]}


def test_dicts_by_numbers_stay_dicts(tmp_path):
    torch.manual_seed(0)
    pipe = OfLayers(LayersNetwork().eval(), diffusers.DDPMScheduler())
    for _ in range(2):  # the second one is read from the cache
        data = CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2, cache=tmp_path / "cache")
        given = data.arguments(slice(0, 2))
        assert list(given["added"]) == [2, 0]
    q = tfmq_fx.quantize(pipe, NEAREST, calibration=data)
    q.save_pretrained(tmp_path / "q")
    for network in (q, tfmq_fx.load(tmp_path / "q")):
        found, expected = network(**given), pipe.unet(**given)
        assert list(found) == [3, 1]
        assert all((found[i] - x).abs().max() < 0.1 * x.abs().max() for i, x in expected.items())


class OfSigmas(Sized):
    """Takes noise levels, and no number of steps."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, sigmas=(1.0, 0.6, 0.3)):
        x = torch.randn(batch_size, 6, 4, generator=generator)
        for sigma in sigmas:
            x = x - 0.1 * self.unet(x, torch.tensor(1000 * sigma), [(2, 3)])
        return {"frames": x.numpy()}


class OfAny(OfSigmas):
    def __call__(self, batch_size=1, generator=None, **_more):
        return super().__call__(batch_size, generator)


def test_a_pipeline_that_takes_no_number_of_steps_is_recorded_with_those_it_has():
    pipe = OfSigmas(SizedNetwork().eval(), diffusers.DDPMScheduler())
    data = CalibrationSet.record(pipe, num_samples=2, num_inference_steps=None)
    assert len(data) == 6
    data = CalibrationSet.record(pipe, num_samples=2, num_inference_steps=None, sigmas=[0.9, 0.5])
    assert data.timesteps.tolist() == [900, 500]
    with pytest.raises(TFMQError, match="takes no 'num_inference_steps'; give num_inference_steps=None"):
        CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2)
    pipe.__class__ = OfAny  # it ignores what it does not know
    for steps in (None, 2):
        assert len(CalibrationSet.record(pipe, num_samples=2, num_inference_steps=steps)) == 6
    pipe = Sized(SizedNetwork().eval(), diffusers.DDPMScheduler())
    with pytest.raises(TFMQError, match="takes 'num_inference_steps'; the number of steps is missing"):
        CalibrationSet.record(pipe, num_samples=2, num_inference_steps=None)


class Weighted(Sized):
    """Draws one sample at a time, and its network takes a tensor of one number for each of its layers, of which there is one."""

    @torch.no_grad()
    def __call__(self, generator=None, num_inference_steps=2):
        x = torch.randn(1, 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = x - 0.1 * self.unet(x, t, torch.tensor([0.5]))
        return {"frames": x.numpy()}


class WeightedNetwork(ClipNetwork):
    def forward(self, sample, timestep, scales):
        (scale,) = scales.unbind()
        emb = self.time((timestep / 1000).float().reshape(-1, 1)).expand(sample.shape[0], -1)
        return self.out(sample * scale + emb[:, None])


class Placed(Weighted):
    """Its network takes the positions in each of two dimensions, of which there is one."""

    @torch.no_grad()
    def __call__(self, generator=None, num_inference_steps=2):
        x = torch.randn(1, 6, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = x - 0.1 * self.unet(x, t, [torch.tensor([2]), torch.tensor([3])])
        return {"frames": x.numpy()}


class PlacedNetwork(ClipNetwork):
    def forward(self, sample, timestep, positions):
        grid = positions[0].view(1, 1) * positions[1].view(1, 1) / 10
        emb = self.time((timestep / 1000).float().reshape(-1, 1)).expand(sample.shape[0], -1)
        return self.out(sample * grid + emb[:, None])


def test_a_list_of_tensors_of_one_entry_is_that_of_all_rows():
    pipe = Placed(PlacedNetwork().eval(), diffusers.DDPMScheduler())
    data = CalibrationSet.record(pipe, num_samples=3, num_inference_steps=2)
    assert data.constants == {"positions_0": torch.tensor([2]), "positions_1": torch.tensor([3])}
    assert set(data.tensors) == {"sample", "timestep"}


def test_a_tensor_of_one_entry_of_which_a_network_takes_no_second_one_is_that_of_all_rows():
    pipe = Weighted(WeightedNetwork().eval(), diffusers.DDPMScheduler())
    data = CalibrationSet.record(pipe, num_samples=3, num_inference_steps=2)
    assert torch.equal(data.constants["scales"], torch.tensor([0.5]))
    q = tfmq_fx.quantize(pipe, NEAREST, calibration=data)
    x, t, scales = torch.randn(2, 6, 4), torch.tensor(500), torch.tensor([0.5])
    assert (q(x, t, scales) - pipe.unet(x, t, scales)).abs().max() < 0.1  # 8 bits of values up to 4
