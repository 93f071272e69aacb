"""Build the papers' pipelines, and others that users ask for, from tiny random components.

All classes are the real ones of diffusers and transformers, including text encoders and tokenizers.
Everything is made here, saved with `save_pretrained` and read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "cat", "dog", "red", "blue", "small", "picture", "of", "on", "grass")
PROMPTS = ["a red cat", "a small blue dog on grass", "picture of a dog"]
LENGTH = 8  # tokens of a prompt, padded


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One pipeline class and the arguments of its call."""

    name: str
    make: Callable[[Path], Any]  # takes a folder, because tokenizers are read from files
    arguments: dict[str, Any] = field(default_factory=dict)
    guided: bool = False  # whether each step sees conditional and unconditional rows
    finite: dict[str, Any] = field(default_factory=dict)


def _random(network: nn.Module) -> Any:
    """Randomize the parameters that start at zero, because they would hide the layers before them."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({c for w in WORDS for c in w})
    merges: list[tuple[str, str]] = []
    tokens = [*letters, *[f"{c}</w>" for c in letters]]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    tokens = list(dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *tokens]))
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    pairs = [" ".join(m) for m in dict.fromkeys(merges)]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    vocab += [(f"▁{w}", -2.0) for w in WORDS] + [(c, -9.0) for c in sorted({c for w in WORDS for c in w})]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=LENGTH)


def clip_encoder(cls: Any, vocabulary: int, size: int = 16) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=size, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=size, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return cls(config).eval()


def t5_encoder(vocabulary: int, size: int = 16) -> T5EncoderModel:
    config = T5Config(vocab_size=vocabulary, d_model=size, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def autoencoder(latent_channels: int = 4, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels, norm_num_groups=4, sample_size=16, **more,
    ).eval()  # fmt: skip


def unet_2d(channels: int = 3) -> UNet2DModel:
    return _random(
        UNet2DModel(
            sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8,), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )
    )  # fmt: skip


def unet_text(**more: Any) -> UNet2DConditionModel:
    return _random(
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            **{"cross_attention_dim": 16, **more},
        )
    )  # fmt: skip


def ddpm(_: Path | None = None) -> Any:
    return diffusers.DDPMPipeline(unet_2d(), DDPMScheduler())


def _ddim(_: Path) -> Any:
    return diffusers.DDIMPipeline(unet_2d(), DDIMScheduler())


def _ldm(_: Path) -> Any:
    vqvae = VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3, num_vq_embeddings=16, norm_num_groups=4,
    ).eval()  # fmt: skip
    return diffusers.LDMPipeline(vqvae, unet_2d(), DDIMScheduler())


def _dit(_: Path) -> Any:
    transformer = DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_embeds_ada_norm=1000,  # DiTPipeline uses class 1000 for "no label"
    )  # fmt: skip
    return diffusers.DiTPipeline(_random(transformer), autoencoder(), DDIMScheduler())


def _sd(folder: Path) -> Any:
    tokenizer = clip_tokenizer(folder / "clip")
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(CLIPTextModel, len(tokenizer)), tokenizer=tokenizer,
        unet=unet_text(), scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(folder: Path) -> Any:
    tokenizer = clip_tokenizer(folder / "clip")
    unet = unet_text(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16,
        cross_attention_dim=32, use_linear_projection=True, transformer_layers_per_block=1,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(CLIPTextModel, len(tokenizer)),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection, len(tokenizer)), tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(folder / "clip2"), unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def _pixart(cls: Any) -> Callable[[Path], Any]:
    def make(_: Path) -> Any:
        tokenizer = t5_tokenizer()
        transformer = PixArtTransformer2DModel(
            sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
        )  # fmt: skip
        return cls(
            tokenizer=tokenizer, text_encoder=t5_encoder(len(tokenizer)), vae=autoencoder(), transformer=_random(transformer),
            scheduler=DPMSolverMultistepScheduler(),
        )  # fmt: skip

    return make


def _sd3(folder: Path) -> Any:
    tokenizer, t5 = clip_tokenizer(folder / "clip"), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=_random(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.0), text_encoder=clip_encoder(CLIPTextModelWithProjection, len(tokenizer)),
        tokenizer=tokenizer, text_encoder_2=clip_encoder(CLIPTextModelWithProjection, len(tokenizer)),
        tokenizer_2=clip_tokenizer(folder / "clip2"), text_encoder_3=t5_encoder(len(t5), 32), tokenizer_3=t5,
    )  # fmt: skip


def _flux(folder: Path) -> Any:
    tokenizer, t5 = clip_tokenizer(folder / "clip"), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder(shift_factor=0.0),
        text_encoder=clip_encoder(CLIPTextModel, len(tokenizer)), tokenizer=tokenizer, text_encoder_2=t5_encoder(len(t5)),
        tokenizer_2=t5, transformer=_random(transformer),
    )  # fmt: skip


_TEXT: dict[str, Any] = {"prompt": PROMPTS, "height": 16, "width": 16}
_PIXART = {
    **_TEXT,
    "guidance_scale": 3.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": LENGTH,
}
PIPELINES = (
    Pipeline(name="ddpm", make=ddpm),
    Pipeline(name="ddim", make=_ddim, arguments={"eta": 0.5}),
    Pipeline(name="ldm", make=_ldm),
    Pipeline(
        name="dit",
        make=_dit,
        arguments={"class_labels": [1, 2, 3], "guidance_scale": 3.0},
        guided=True,
        finite={"class_labels": [1, 2, 3, 1000]},
    ),
    Pipeline(name="sd", make=_sd, arguments={**_TEXT, "negative_prompt": ["a dog"]}, guided=True),
    Pipeline(name="sdxl", make=_sdxl, arguments={**_TEXT, "guidance_scale": 3.0}, guided=True),
    Pipeline(
        name="pixart-alpha", make=_pixart(diffusers.PixArtAlphaPipeline), arguments=_PIXART, guided=True
    ),
    Pipeline(
        name="pixart-sigma", make=_pixart(diffusers.PixArtSigmaPipeline), arguments=_PIXART, guided=True
    ),
    Pipeline(name="sd3", make=_sd3, arguments={**_TEXT, "max_sequence_length": LENGTH}, guided=True),
    Pipeline(name="flux", make=_flux, arguments={**_TEXT, "max_sequence_length": LENGTH}),
)


def saved(entry: Pipeline, folder: Path) -> Any:
    """Return the pipeline after `save_pretrained` and `DiffusionPipeline.from_pretrained`, as users load it."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        entry.make(folder / "files").save_pretrained(folder / "pipe")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "pipe")
    pipe.set_progress_bar_config(disable=True)
    return pipe
