"""Pipelines that ask more of their denoiser than a call: its class, its attributes, its methods, with their features on."""

import functools

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import tfmq_fx
from benchmarks.networks.pipelines import (
    PIPELINES,
    _random,
    autoencoder,
    clip_encoder,
    clip_tokenizer,
    saved,
    t5_encoder,
    t5_tokenizer,
    unet_text,
)
from tests.helpers.nearest import recipe
from tfmq_fx.calibration.data import CalibrationSet

NEAREST = recipe("w8a8")
STEPS = 2
NOISE = np.random.RandomState(0).rand(16, 16, 3)
PICTURE = Image.fromarray((NOISE * 255).astype("uint8"))
MASK = Image.fromarray((NOISE[..., 0] > 0.5).astype("uint8") * 255)
TEXT = {"prompt": ["a red cat"], "height": 16, "width": 16}
# diffusers' own, on this torch and numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Return the components of a pipeline by its name, with a scheduler that takes any number of steps."""

    @functools.cache
    def of(name):
        (entry,) = [e for e in PIPELINES if e.name == name]
        return dict(saved(entry, tmp_path_factory.mktemp(name)).components)

    def make(name, **more):
        found = of(name) | more
        if name == "sd" and "scheduler" not in more:
            found["scheduler"] = diffusers.DDIMScheduler.from_config(
                found["scheduler"].config, clip_sample=False
            )
        return found

    return make


def controlnet(unet):
    return _random(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)))


def image_encoder():
    config = CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, intermediate_size=16,
        patch_size=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval(), CLIPImageProcessor(crop_size=16, size=16)


def _control(parts, _, cls=diffusers.StableDiffusionControlNetPipeline, **more):
    given = parts("sd")
    pipe = cls(**given, controlnet=controlnet(given["unet"]), requires_safety_checker=False, **more)
    return pipe, ("controlnet",), {**TEXT, "image": PICTURE}


def _both(parts, folder):
    pipe, _, given = _control(parts, folder)
    return pipe, ("unet", "controlnet"), given


def _control_pag(parts, folder):
    pipe, _, given = _control(parts, folder, diffusers.StableDiffusionControlNetPAGPipeline)
    return pipe, ("controlnet",), {**given, "pag_scale": 2.0}


def _control_image(parts, folder):
    pipe, names, given = _control(parts, folder, diffusers.StableDiffusionControlNetImg2ImgPipeline)
    return pipe, names, {**given, "control_image": PICTURE, "strength": 1.0}


def _controls(parts, _):
    given = parts("sd")
    nets = [controlnet(given["unet"]) for _ in "ab"]
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **given, controlnet=nets, requires_safety_checker=False
    )
    pipe.controlnet.eval()  # the pipeline has put the nets into a module
    more = {"image": [PICTURE, PICTURE], "controlnet_conditioning_scale": [1.0, 0.5]}
    return pipe, ("controlnet",), {**TEXT, "prompt": "a red cat", **more}


def _control_xl(parts, _):
    given = parts("sdxl")
    pipe = diffusers.StableDiffusionXLControlNetPipeline(
        **given, controlnet=controlnet(given["unet"]), add_watermarker=False
    )
    return pipe, ("controlnet",), {**TEXT, "image": PICTURE}


def _control_sd3(parts, _):
    given = parts("sd3")
    net = diffusers.SD3ControlNetModel.from_transformer(
        given["transformer"],
        num_layers=1,
        num_extra_conditioning_channels=0,
        load_weights_from_transformer=False,
    )
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**given, controlnet=_random(net))
    return pipe, ("controlnet",), {**TEXT, "control_image": PICTURE, "max_sequence_length": 8}


def _skip_layers(parts, _):
    pipe = diffusers.StableDiffusion3Pipeline(**parts("sd3"))
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0, "max_sequence_length": 8}
    return pipe, ("transformer",), {**TEXT, **more}


def _control_flux(parts, _):
    net = diffusers.FluxControlNetModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    given = {n: x for n, x in parts("flux").items() if n not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.FluxControlNetPipeline(**given, controlnet=_random(net))
    return pipe, ("controlnet",), {**TEXT, "control_image": PICTURE, "max_sequence_length": 8}


def _ip_adapter(parts, _):
    encoder, processor = image_encoder()
    given = parts("sd", unet=unet_text(), image_encoder=encoder, feature_extractor=processor)
    unet = given["unet"]
    layers = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    names = [f"{2 * i + 1}.to_{x}_ip.weight" for i in range(len(layers)) for x in "kv"]
    weights = {
        "ip_adapter": {n: torch.randn(16, 16) for n in names},
        "image_proj": {
            "proj.weight": torch.randn(64, 16), "proj.bias": torch.randn(64), "norm.weight": torch.ones(16),
            "norm.bias": torch.zeros(16),
        },
    }  # fmt: skip
    unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    unet.eval()
    pipe = diffusers.StableDiffusionPipeline(**given, requires_safety_checker=False)
    return pipe, ("unet",), {**TEXT, "ip_adapter_image": PICTURE}


def _inpaint(parts, _):
    pipe = diffusers.StableDiffusionInpaintPipeline(
        **parts("sd", unet=unet_text(in_channels=9)), requires_safety_checker=False
    )
    return pipe, ("unet",), {**TEXT, "image": PICTURE, "mask_image": MASK}


def _edit(parts, _):
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        **parts("sd", unet=unet_text(in_channels=8)), requires_safety_checker=False
    )
    return pipe, ("unet",), {"prompt": ["a red cat"], "image": PICTURE}


def _lcm(parts, _):
    given = parts("sd", unet=unet_text(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler())
    return diffusers.LatentConsistencyModelPipeline(**given, requires_safety_checker=False), ("unet",), TEXT


def _pag_off(parts, _):
    pipe = diffusers.StableDiffusionPAGPipeline(**parts("sd"), requires_safety_checker=False)
    return pipe, ("unet",), {**TEXT, "pag_scale": 0.0, "guidance_rescale": 0.7, "num_images_per_prompt": 2}


def _xl_inpaint(parts, _):
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**parts("sdxl"), add_watermarker=False)
    return (
        pipe,
        ("unet",),
        {**TEXT, "image": PICTURE, "mask_image": MASK, "strength": 1.0, "guidance_scale": 2.0},
    )


def _flux_cfg(parts, _):
    more = {"true_cfg_scale": 3.0, "negative_prompt": ["a dog"], "max_sequence_length": 8}
    return diffusers.FluxPipeline(**parts("flux")), ("transformer",), {**TEXT, **more}


def _wan(*_):
    tokenizer = t5_tokenizer()
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=1,
        rope_max_seq_len=32,
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=t5_encoder(len(tokenizer), 32), transformer=_random(transformer), vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    return (
        pipe,
        ("transformer",),
        {**TEXT, "negative_prompt": ["a dog"], "num_frames": 5, "max_sequence_length": 16},
    )


def _prior(_, folder):
    """The pipeline scales what the prior returns by a method of its class, which reads weights that it never computes with."""
    encoder, processor = image_encoder()
    tokenizer = clip_tokenizer(folder)
    prior = _random(
        diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1, num_embeddings=8
        )
    )
    with torch.no_grad():
        prior.clip_mean.fill_(0.5)
        prior.clip_std.fill_(2.0)
    pipe = diffusers.KandinskyV22PriorPipeline(
        prior=prior, image_encoder=encoder, text_encoder=clip_encoder(CLIPTextModelWithProjection, len(tokenizer)),
        tokenizer=tokenizer, image_processor=processor,
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
    )  # fmt: skip
    return pipe, ("prior",), {"prompt": ["a red cat"], "output_type": "pt"}


def _aura(*_):
    tokenizer = t5_tokenizer()
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = diffusers.AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=t5_encoder(len(tokenizer), 32), vae=autoencoder(), transformer=_random(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    return pipe, ("transformer",), {**TEXT, "max_sequence_length": 8}


# A few of them stand for the rest: ControlNets, adapters, methods, the context of a step, true guidance, layers to skip.
QUICK = (_control, _ip_adapter, _prior, _wan, _skip_layers)
SLOW = (
    _both, _controls, _control_pag, _control_image, _control_xl, _control_sd3, _control_flux, _inpaint, _edit, _lcm, _pag_off,
    _xl_inpaint, _flux_cfg, _aura,
)  # fmt: skip


@pytest.mark.parametrize("make", [*QUICK, *[pytest.param(m, marks=pytest.mark.slow) for m in SLOW]])
def test_the_pipeline_takes_the_quantized_network_with_its_features_on(make, parts, tmp_path):
    pipe, names, given = make(parts, tmp_path / "files")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        out = pipe(
            **{"output_type": "np", **given},
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(1),
        )
        first = next(iter(out.values()))
        return torch.as_tensor(np.asarray(first if not isinstance(first, list) else first[0])).double()

    torch.manual_seed(1)
    expected = draw()
    for name in names:
        network = getattr(pipe, name)
        data = CalibrationSet.record(pipe, num_samples=1, num_inference_steps=STEPS, component=name, **given)
        q = tfmq_fx.quantize(pipe, NEAREST, calibration=data, component=name)
        q.save_pretrained(tmp_path / name)
        q = tfmq_fx.load(tmp_path / name)
        assert isinstance(q, type(network))
        setattr(pipe, name, q)
        torch.manual_seed(1)
        # 8 bits, nearest: guidance multiplies the errors of these random networks. Other noise is 0.5 away.
        assert (draw() - expected).norm() < 0.2 * expected.norm()
        assert q.report["unseen_timesteps"] == {}
