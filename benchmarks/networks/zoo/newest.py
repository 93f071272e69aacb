"""Networks of 2025 and 2026, of video, and ControlNets, at reduced and published sizes.

Those that take padded prompts get masks of ones. diffusers' defaults are the published sizes, unless an entry says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    ControlNetModel,
    FluxControlNetModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    I2VGenXLUNet,
    Lumina2Transformer2DModel,
    MochiTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor

from benchmarks.networks.zoo.entry import (
    FLOAT,
    TIME,
    WORDS,
    Entry,
    builder,
    noise,
    of_timestep,
    pair,
    resnets,
    steps,
)


def _ones(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)


class Lumina2(Lumina2Transformer2DModel):  # type: ignore[misc]
    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> Any:
        mask = _ones(encoder_hidden_states)
        return super().forward(hidden_states, timestep, encoder_hidden_states, mask, return_dict=return_dict)


class Mochi(MochiTransformer3DModel):  # type: ignore[misc]
    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, return_dict: bool = True
    ) -> Any:
        mask = _ones(encoder_hidden_states)
        return super().forward(hidden_states, encoder_hidden_states, timestep, mask, return_dict=return_dict)


class HunyuanImage(HunyuanImageTransformer2DModel):  # type: ignore[misc]
    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, glyphs: Tensor, return_dict: bool = True
    ) -> Any:  # fmt: skip
        return super().forward(
            hidden_states, timestep, encoder_hidden_states, _ones(encoder_hidden_states), encoder_hidden_states_2=glyphs,
            encoder_attention_mask_2=_ones(glyphs), return_dict=return_dict,
        )  # fmt: skip


class HunyuanVideo15(HunyuanVideo15Transformer3DModel):  # type: ignore[misc]
    """Of text alone: there is no picture, which its zeros say."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, glyphs: Tensor, return_dict: bool = True
    ) -> Any:  # fmt: skip
        picture = hidden_states.new_zeros(hidden_states.shape[0], 3, self.config.image_embed_dim)
        return super().forward(
            hidden_states, timestep, encoder_hidden_states, _ones(encoder_hidden_states), encoder_hidden_states_2=glyphs,
            encoder_attention_mask_2=_ones(glyphs), image_embeds=picture, return_dict=return_dict,
        )  # fmt: skip


def _words(real: bool, width: int, *, small: int = 20) -> Tensor:
    return noise(2, 256, width) if real else noise(2, WORDS, small)


def _glyphs(real: bool, width: int) -> Tensor:
    return noise(2, 64, width) if real else noise(2, 3, 12)


def _flux_ids(real: bool) -> dict[str, Tensor]:
    return {
        "img_ids": torch.zeros(4096 if real else 16, 3),
        "txt_ids": torch.zeros(256 if real else WORDS, 3),
    }


def _tokens(real: bool) -> Tensor:
    return noise(2, 4096, 64) if real else noise(2, 16, 16)


def _video(real: bool, channels: int, *, small: int) -> Tensor:
    return noise(2, channels, 5, 16, 16) if real else noise(2, small, 2, 4, 4)


def _per_frame(real: bool) -> Tensor:
    """A timestep for each frame: the first one is further denoised."""
    rows = [[100.0, *[900.0] * 4], [300.0, *[500.0] * 4]] if real else [[17.0, 803.0], [400.0, 500.0]]
    return torch.tensor(rows)


_CHROMA = "distilled_guidance_layer"
_FLUX_SMALL = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
_HUNYUAN_SMALL = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
    "num_refiner_layers": 1, "text_embed_dim": 20,
}  # fmt: skip
_HUNYUAN_WORDS = pair(
    "context_embedder.time_text_embed.timestep_embedder"
)  # their refiner has a time of its own
_DOUBLE = ("transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear")
_HUNYUAN = (*_DOUBLE, "single_transformer_blocks.0.norm.linear", "norm_out.linear")
_WAN_TIME = pair("condition_embedder.time_embedder")  # what its last norm reads is a feature as well
_WAN_SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip
_UNET_SMALL = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 20,
}  # fmt: skip
_FLUX_TIME = pair("time_text_embed.timestep_embedder")
_FLUX_POOLED = pair("time_text_embed.text_embedder")
_I2V = resnets(down=(1, 1), up=(2, 2))
_FPS = ("fps_embedding.0", "fps_embedding.2")
_CONTROL_FLUX = (*_DOUBLE, "single_transformer_blocks.0.norm.linear")

NEWEST = (
    of_timestep(
        "chroma", ChromaTransformer2DModel,
        {**_FLUX_SMALL, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1},
        lambda real: {
            "hidden_states": _tokens(real), "encoder_hidden_states": _words(real, 4096), "timestep": FLOAT / 1000, **_flux_ids(real)
        },
        before=(f"{_CHROMA}.in_proj", f"{_CHROMA}.layers.0.linear_1", f"{_CHROMA}.layers.0.linear_2"),
        features=(f"{_CHROMA}.out_proj",),
    ),
    of_timestep(
        "lumina-2", Lumina2,
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 3,
         "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2), "axes_lens": (64,) * 3, "cap_feat_dim": 20},
        lambda real: {
            "hidden_states": noise(2, 16, 128, 128) if real else noise(2, 4, 8, 8), "timestep": FLOAT / 1000,
            "encoder_hidden_states": _words(real, 1024),
        },
        before=pair("time_caption_embed.timestep_embedder"),
        features=("noise_refiner.0.norm1.linear", "layers.0.norm1.linear", "norm_out.linear_1"),
        bitwise_note="captured row by row",
    ),
    of_timestep(
        "hunyuan-dit", HunyuanDiT2DModel,
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
         "hidden_size": 16, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16,
         "text_len": WORDS, "text_len_t5": WORDS, "use_style_cond_and_image_meta_size": False},
        lambda real: {
            "hidden_states": noise(2, 4, 128, 128) if real else noise(2, 4, 8, 8), "timestep": FLOAT,
            "encoder_hidden_states": noise(2, 77, 1024) if real else _words(real, 0, small=16),
            "text_embedding_mask": torch.ones(2, 77 if real else WORDS), "encoder_hidden_states_t5": _words(real, 2048, small=16),
            "text_embedding_mask_t5": torch.ones(2, 256 if real else WORDS),
            "image_rotary_emb": [noise(4096 if real else 16, 88 if real else 8) for _ in range(2)],
        },
        # The pooled prompt is data, and joins it before each block's own layer.
        before=("time_extra_emb.timestep_embedder.linear_1",), features=("time_extra_emb.timestep_embedder.linear_2",),
        published={"sample_size": 128, "patch_size": 2, "in_channels": 4, "num_layers": 40, "hidden_size": 1408, "mlp_ratio": 4.3637,
                   "activation_fn": "gelu-approximate", "use_style_cond_and_image_meta_size": False},  # of version 1.2
        bitwise_note="two tables of positions",
    ),
    of_timestep(
        "hunyuan-image", HunyuanImage,
        {**_HUNYUAN_SMALL, "num_single_layers": 1, "text_embed_2_dim": 12, "rope_axes_dim": (4, 4)},
        lambda real: {
            "hidden_states": noise(2, 64, 64, 64) if real else noise(2, 4, 4, 4), "timestep": FLOAT,
            "encoder_hidden_states": _words(real, 3584), "glyphs": _glyphs(real, 1472),
        },
        before=(_HUNYUAN_WORDS[0], *pair("time_guidance_embed.timestep_embedder")), features=(_HUNYUAN_WORDS[1], *_HUNYUAN),
        bitwise_note="captured row by row",
    ),
    Entry(
        name="hunyuan-video",
        build=builder(
            HunyuanVideoTransformer3DModel, {},
            {**_HUNYUAN_SMALL, "num_single_layers": 1, "pooled_projection_dim": 28, "rope_axes_dim": (2, 2, 4)},
        ),
        inputs=lambda real: {
            "hidden_states": _video(real, 16, small=4), "timestep": FLOAT, "encoder_hidden_states": _words(real, 4096),
            "encoder_attention_mask": _ones(_words(real, 4096)), "pooled_projections": noise(2, 768 if real else 28),
            "guidance": torch.tensor([3000.0, 6000.0]), "return_dict": False,
        },
        features=(_HUNYUAN_WORDS[1], *_HUNYUAN),
        layers=(*_HUNYUAN_WORDS, *_FLUX_TIME, *pair("time_text_embed.guidance_embedder"), *_FLUX_POOLED, *_HUNYUAN),
        keys=("timestep", "pooled_projections", "guidance"),
        pure_features=(_HUNYUAN_WORDS[1], _FLUX_TIME[1]),
        pure_layers=(*_HUNYUAN_WORDS, *_FLUX_TIME),
    ),
    of_timestep(
        "hunyuan-video-1.5", HunyuanVideo15,
        {**_HUNYUAN_SMALL, "in_channels": 9, "text_embed_2_dim": 12, "image_embed_dim": 16, "target_size": 16,
         "rope_axes_dim": (2, 2, 4)},
        lambda real: {
            "hidden_states": _video(real, 65, small=9), "timestep": FLOAT, "encoder_hidden_states": _words(real, 3584),
            "glyphs": _glyphs(real, 1472),
        },
        before=(_HUNYUAN_WORDS[0], *pair("time_embed.timestep_embedder")), features=(_HUNYUAN_WORDS[1], *_DOUBLE, "norm_out.linear"),
        bitwise_note="captured row by row",
    ),
    of_timestep(
        "mochi", Mochi,
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16, "text_embed_dim": 16,
         "time_embed_dim": 4, "max_sequence_length": WORDS},
        lambda real: {
            "hidden_states": _video(real, 12, small=12), "encoder_hidden_states": _words(real, 4096, small=16), "timestep": FLOAT,
        },
        # The pooled prompt is data, and joins it before each block's own layer.
        before=("time_embed.timestep_embedder.linear_1",), features=("time_embed.timestep_embedder.linear_2",),
        bitwise_note="captured row by row",
    ),
    of_timestep(
        "wan-2.2", WanTransformer3DModel, _WAN_SMALL,
        lambda real: {
            "hidden_states": _video(real, 16, small=4), "timestep": _per_frame(real).repeat_interleave(64 if real else 4, 1),
            "encoder_hidden_states": _words(real, 4096),
        },
        before=_WAN_TIME[:1], features=(_WAN_TIME[1], "condition_embedder.time_proj"),
    ),
    of_timestep(
        "skyreels-v2-forcing", SkyReelsV2Transformer3DModel, _WAN_SMALL,
        lambda real: {
            "hidden_states": _video(real, 16, small=4), "timestep": _per_frame(real), "encoder_hidden_states": _words(real, 4096),
            "enable_diffusion_forcing": True,
        },
        before=_WAN_TIME[:1], features=(_WAN_TIME[1], "condition_embedder.time_proj"),
    ),
    Entry(
        name="i2vgen-xl",
        build=builder(
            I2VGenXLUNet, {},
            {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16,
             "num_attention_heads": 2, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
             "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        ),
        inputs=lambda real: {
            "sample": noise(2, 4, 16, 64, 64) if real else noise(2, 4, 2, 8, 8), "timestep": steps(), "fps": torch.tensor([8, 16]),
            "image_latents": noise(2, 4, 16, 64, 64) if real else noise(2, 4, 2, 8, 8),
            "image_embeddings": noise(2, 1024 if real else 16), "encoder_hidden_states": _words(real, 1024, small=16),
            "return_dict": False,
        },
        features=_I2V, layers=(*TIME, *_FPS, *_I2V), keys=("timestep", "fps"), pure_features=TIME[1:], pure_layers=TIME,
    ),
    of_timestep(
        "controlnet", ControlNetModel,
        {**_UNET_SMALL, "attention_head_dim": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "conditioning_embedding_out_channels": (8, 8)},
        lambda real: {
            "sample": noise(2, 4, 64, 64) if real else noise(2, 4, 8, 8), "timestep": steps(),
            "encoder_hidden_states": _words(real, 1280), "controlnet_cond": noise(2, 3, 512, 512) if real else noise(2, 3, 16, 16),
        },
        before=TIME, features=resnets(down=(1, 1), up=()),
    ),
    Entry(
        name="flux-controlnet",
        build=builder(FluxControlNetModel, {}, {**_FLUX_SMALL, "pooled_projection_dim": 28}),
        inputs=lambda real: {
            "hidden_states": _tokens(real), "controlnet_cond": _tokens(real), "encoder_hidden_states": _words(real, 4096),
            "pooled_projections": noise(2, 768 if real else 28), "timestep": FLOAT / 1000, **_flux_ids(real), "return_dict": False,
        },
        features=_CONTROL_FLUX, layers=(*_FLUX_TIME, *_FLUX_POOLED, *_CONTROL_FLUX), keys=("timestep", "pooled_projections"),
        pure_features=_FLUX_TIME[1:], pure_layers=_FLUX_TIME,
    ),
)  # fmt: skip
