"""Pipelines that set other attention processors while they sample: the rows that these compute in another way."""

import copy
import functools

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import nn

import tfmq_fx
from tests.helpers.nearest import recipe
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.perturbed import placed
from tfmq_fx.capturing.calibrated import captured
from tfmq_fx.graph.inputs import placeholders

NEAREST = recipe("w8a8")
FRAMES = 2


class Attending(nn.Module):
    """Attention within each of a sample's frames, which are rows of the attention."""

    def __init__(self):
        super().__init__()
        make = functools.partial(Attention, 8, heads=2, dim_head=4)
        self.mid = nn.ModuleDict({n: make(processor=AttnProcessor2_0()) for n in ("first", "second")})
        self.time, self.words, self.out = nn.Linear(1, 8), nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, sample, timestep, words):
        t = self.time(timestep.expand(sample.shape[0])[:, None].float() / 1000)
        x = sample + (t + self.words(words))[:, None, None]
        for attention in self.mid.values():
            frames, found = x.shape[1], attention(x.flatten(0, 1))
            x = x + 3 * found.reshape(len(found) // frames, frames, *found.shape[1:])
        return self.out(x)


def processors(unet):
    return {n: m.processor for n, m in unet.named_modules() if isinstance(m, Attention)}


def put_back(unet, own):
    for name, module in unet.named_modules():
        if name in own:
            module.processor = own[name]


class Perturbing(diffusers.DiffusionPipeline, PAGMixin):  # type: ignore[misc]
    """A loop that guides by the condition, by perturbed attention, by both or by neither."""

    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)
        self.set_pag_applied_layers("mid")

    @torch.no_grad()
    def __call__(
        self, prompt, num_inference_steps=2, generator=None, guidance_scale=2.0, pag_scale=2.0, stop=1.0, processor=None
    ):  # fmt: skip
        x = torch.randn(len(prompt), FRAMES, 3, 8, generator=generator)
        cond, none = torch.tensor(prompt)[:, None].expand(-1, 4), torch.zeros(len(prompt), 4)
        parts, own = [none, cond] if guidance_scale > 1 else [cond], processors(self.unet)
        for i in range(num_inference_steps):
            if pag_scale and i == 0:
                parts = [*parts, cond]
                self._set_pag_attn_processor(self.pag_applied_layers, guidance_scale > 1)
            if pag_scale and i == int(stop * num_inference_steps):
                parts = parts[:-1]
                put_back(self.unet, own)
            if processor is not None and i > 0:
                self.unet.mid.first.processor = processor
            t = torch.tensor(900 - 400 * i)
            new = self.unet(x.repeat(len(parts), 1, 1, 1), t, torch.cat(parts)).chunk(len(parts))
            x = x - 0.1 * sum(new) - 0.3 * (new[-2] - new[-1] if len(parts) > 1 else 0)
        put_back(self.unet, own)
        return {"latents": x}


def perturbing():
    torch.manual_seed(0)
    return Perturbing(Attending().eval())


@functools.cache
def recorded(guidance_scale=2.0, pag_scale=2.0):
    pipe = perturbing()
    more = {"guidance_scale": guidance_scale, "pag_scale": pag_scale}
    data = CalibrationSet.record(pipe, num_samples=4, num_inference_steps=2, prompt=[1.0, -2.0], **more)
    return pipe, data


@functools.cache
def quantized(**given):
    pipe, data = recorded(**given)
    return pipe, tfmq_fx.quantize(pipe, NEAREST, calibration=data)


def drawn(pipe, unet=None, samples=2, **given):
    pipe = copy.copy(pipe)
    pipe.unet = pipe.unet if unet is None else unet
    return pipe(
        [1.0, -2.0, 0.5][:samples], generator=torch.Generator().manual_seed(3), **given
    )["latents"]  # fmt: skip


def off(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("guidance_scale", "pattern"), [(2.0, (False, False, True)), (1.0, (False, True))])
def test_each_row_says_how_it_is_computed(guidance_scale, pattern):
    pipe, data = recorded(guidance_scale)
    assert data.perturbation.pattern == pattern
    assert list(data.perturbation.objects) == ["mid.first.processor", "mid.second.processor"]
    call = torch.tensor(pattern).repeat_interleave(4)
    assert torch.equal(data.tensors["perturbed_rows"], call.repeat(2))
    rows = data.arguments(slice(0, len(call)))
    given = {n: x for n, x in rows.items() if n != "perturbed_rows"}
    with torch.no_grad(), placed(pipe.unet, data.perturbation.objects):
        expected = pipe.unet(**given)
    order = torch.randperm(len(call))
    with torch.no_grad():
        plain = pipe.unet(**given)
        found = data.row_wise(pipe.unet)(**{n: x[order] for n, x in rows.items()})
    assert torch.allclose(found, expected[order], atol=1e-5)
    assert off(plain[call], expected[call]) > 0.1 > 1e-5 > off(plain[~call], expected[~call])
    assert {type(p) for p in processors(pipe.unet).values()} == {AttnProcessor2_0}


def test_its_graph_has_one_number_of_rows():
    """Others, that happen to be as large, made expressions of sizes that took torch.export minutes."""
    pipe, data = recorded(2.0)
    gm, _, _ = captured(pipe.unet, data, "timestep")
    inputs, out = placeholders(gm), gm.graph.output_node().all_input_nodes[0]
    sizes = {str(n.meta["val"].shape[0]) for n in (*inputs.values(), out)}
    assert len(sizes) == 1
    assert not sizes.pop().isdigit()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("pag_scale", [2.0, 0.0])
def test_the_quantized_network_perturbs_what_the_pipeline_perturbs(samples, pag_scale):
    pipe, q = quantized()
    given = {"samples": samples, "pag_scale": pag_scale}
    expected = drawn(pipe, **given)
    assert off(drawn(pipe, q, **given), expected) < 0.02  # W8A8
    assert off(drawn(pipe, samples=samples, pag_scale=2.0 - pag_scale), expected) > 0.05
    assert not q.placed


def test_it_is_kept_by_files_copies_and_exports(tmp_path):
    pipe, q = quantized()
    q.save_pretrained(tmp_path)
    expected = drawn(pipe, q)
    for other in (tfmq_fx.load(tmp_path), copy.deepcopy(q)):
        assert torch.equal(drawn(pipe, other), expected)
    q.export(tmp_path / "q.pt2")
    program = torch.export.load(tmp_path / "q.pt2").module()
    given = recorded()[1].arguments(slice(0, 6))
    with torch.no_grad():
        assert torch.allclose(program(**given), q(**given), atol=1e-6)


def test_what_was_not_calibrated_is_refused():
    pipe, q = quantized()
    with pytest.raises(
        TFMQError, match=r"mid\.first\.processor: a quantized network is fixed as it was captured"
    ):
        drawn(pipe, q, guidance_scale=1.0)
    pipe = copy.copy(pipe)
    pipe.set_pag_applied_layers(["mid.second"])
    with pytest.raises(
        TFMQError, match=r"mid\.first\.processor is the float network's own, but was another one"
    ):
        drawn(pipe, q)
    put_back(q, processors(pipe.unet))
    assert not q.placed
    unperturbed = quantized(pag_scale=0.0)[1]
    with pytest.raises(
        TFMQError, match=r"mid\.first\.processor: a quantized network is fixed as it was captured"
    ):
        drawn(perturbing(), unperturbed)


def test_calls_without_it_have_no_such_rows():
    pipe = perturbing()
    data = CalibrationSet.record(pipe, num_samples=2, num_inference_steps=4, prompt=[1.0, -2.0], stop=0.5)
    assert data.tensors["perturbed_rows"].int().tolist() == 2 * [0, 0, 0, 0, 1, 1] + 2 * [0, 0, 0, 0]


class Mixing(PAGIdentitySelfAttnProcessor2_0):  # type: ignore[misc]
    def __call__(self, attn, hidden_states, **_):
        return attn.to_v(hidden_states) - hidden_states.mean(0)


class Keeping(AttnProcessor2_0):  # type: ignore[misc]
    def __call__(self, attn, hidden_states, **more):
        self.kept = [super().__call__(attn, hidden_states, **more)]
        return self.kept[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"processor": Keeping(), "pag_scale": 0.0}, "reads mid.first.processor.kept, which its network computes on the way"),
        ({"processor": PAGCFGIdentitySelfAttnProcessor2_0(), "pag_scale": 2.0}, "sets mid.first.processor otherwise in call"),
        ({"processor": Mixing(), "pag_scale": 0.0}, "to a Mixing while it samples, which only its own code can compute"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_row_by_row_is_refused(given, words):
    with pytest.raises(TFMQError, match=words):
        CalibrationSet.record(perturbing(), num_samples=2, num_inference_steps=2, prompt=[1.0, -2.0], **given)


def test_a_cache_cannot_keep_it(tmp_path):
    with pytest.raises(
        TFMQError, match=r"cannot keep what the pipeline sets while it samples \(mid.first.processor\)"
    ):
        CalibrationSet.record(
            perturbing(), num_samples=2, num_inference_steps=2, prompt=[1.0, -2.0], cache=tmp_path
        )
