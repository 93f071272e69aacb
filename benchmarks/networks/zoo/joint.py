"""Networks of video with sound, of sound, of pictures that are edited, and of several stages, frames or modalities.

At reduced and published sizes. diffusers' defaults are the published sizes, unless an entry says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    LTX2VideoTransformer3DModel,
    QwenImageTransformer2DModel,
    StableAudioDiTModel,
    StableCascadeUNet,
    UNetMotionModel,
    UniDiffuserModel,
)
from torch import Tensor

from benchmarks.networks.zoo.entry import (
    ADD,
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
from benchmarks.networks.zoo.recent import EMBEDDER, QWEN, QWEN_SMALL


class LTX23(LTX2VideoTransformer3DModel):  # type: ignore[misc]
    """LTX-2.3: sigma, which prompts and cross attention read, is the timestep, as its pipeline calls it."""

    def forward(self, timestep: Tensor, **inputs: Any) -> Any:
        return super().forward(timestep=timestep, sigma=timestep, use_cross_timestep=True, **inputs)


class AnimateDiff(UNetMotionModel):  # type: ignore[misc]
    """Its pipeline repeats the prompt for each frame."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> Any:
        tokens = encoder_hidden_states.repeat_interleave(sample.shape[2], dim=0)
        return super().forward(sample, timestep, tokens, return_dict=return_dict)


def _ltx2_inputs(
    real: bool, video: int = 3840, sound: int = 3840, *, small: tuple[int, int] = (20, 20)
) -> dict[str, Any]:
    """video, sound: the widths of the published prompts; small: of the reduced ones."""
    frames, height, width, sounds, words = (16, 16, 24, 126, 1024) if real else (2, 2, 3, 5, WORDS)
    channels = 128 if real else 4
    return {
        "hidden_states": noise(2, frames * height * width, channels),
        "audio_hidden_states": noise(2, sounds, channels),
        "encoder_hidden_states": noise(2, words, video if real else small[0]),
        "audio_encoder_hidden_states": noise(2, words, sound if real else small[1]),
        "timestep": FLOAT,
        "encoder_attention_mask": torch.ones(2, words),
        "audio_encoder_attention_mask": torch.ones(2, words),
        "num_frames": frames, "height": height, "width": width, "audio_num_frames": sounds,
    }  # fmt: skip


def _edit_inputs(real: bool) -> dict[str, Any]:
    """The latent and the picture to edit, one behind the other."""
    shapes = [(1, 64, 64), (1, 64, 64)] if real else [(1, 4, 4), (1, 2, 4)]
    words = (256, 3584) if real else (WORDS, 20)
    return {
        "hidden_states": noise(2, 8192, 64) if real else noise(2, 24, 16),
        "encoder_hidden_states": noise(2, *words),
        "encoder_hidden_states_mask": torch.ones(2, words[0], dtype=torch.long),
        "timestep": FLOAT / 1000,
        "img_shapes": [shapes] * 2,
    }


def _cascade(levels: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    return {"block_types_per_layer": [[f"SDCascade{kind}Block" for kind in level] for level in levels]}


def _ltx2_layers(*parts: str) -> tuple[str, ...]:
    return tuple(layer for part in parts for layer in pair(f"{part}.emb.timestep_embedder"))


_ALL = ("Res", "Timestep", "Attn")
_CASCADE_SMALL = {
    "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16, "block_out_channels": (8, 16),
    "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
    "clip_text_pooled_in_channels": 20, "clip_seq": 2,
}  # fmt: skip
_CASCADE = tuple(f"{part}_blocks.{level}.1.mapper" for part in ("down", "up") for level in range(2))
_LTX2_SMALL = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 12, "num_layers": 2, "caption_channels": 20,
}  # fmt: skip
_OWN = ("time_embed", "audio_time_embed")  # whose embedding the last norms read: a feature as well
_CROSS = tuple(
    f"av_cross_attn_{part}"
    for part in ("video_scale_shift", "audio_scale_shift", "video_a2v_gate", "audio_v2a_gate")
)
_PROMPTS = ("prompt_adaln", "audio_prompt_adaln")
_LTX2_OWN = _ltx2_layers(*_OWN)
_SD_XL_CONTROL = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_CONTROL = resnets(down=(1, 1, 1), up=())

JOINT = (
    of_timestep(
        "ltx-2", LTX2VideoTransformer3DModel, _LTX2_SMALL, _ltx2_inputs,
        before=(*_LTX2_OWN[::2], *_ltx2_layers(*_CROSS)), features=(*_LTX2_OWN[1::2], *(f"{p}.linear" for p in (*_OWN, *_CROSS))),
        published={"rope_type": "split"},
    ),
    of_timestep(
        "ltx-2.3", LTX23, _LTX2_SMALL, lambda real: _ltx2_inputs(real, 4096, 2048, small=(16, 12)),
        before=(*_LTX2_OWN[::2], *_ltx2_layers(*_CROSS, *_PROMPTS)),
        features=(*_LTX2_OWN[1::2], *(f"{p}.linear" for p in (*_OWN, *_CROSS, *_PROMPTS))),
        published={
            "rope_type": "split", "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
            "use_prompt_embeddings": False, "perturbed_attn": True,
        },
    ),
    of_timestep(
        "stable-audio", StableAudioDiTModel,
        {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "num_key_value_attention_heads": 1, "cross_attention_dim": 16, "time_proj_dim": 8, "global_states_input_dim": 12,
         "cross_attention_input_dim": 20},
        lambda real: {
            "hidden_states": noise(2, 64, 1024) if real else noise(2, 4, 16), "timestep": torch.tensor([0.25, 0.75]),
            "encoder_hidden_states": noise(2, 130, 768) if real else noise(2, WORDS, 20),
            "global_hidden_states": noise(2, 1, 1536 if real else 12),
            "rotary_embedding": [noise(1025 if real else 17, 32 if real else 8) for _ in range(2)],
        },
        # The seconds of the clip are data, a token that the embedding is added to.
        before=("timestep_proj.0",), features=("timestep_proj.2",), bitwise_note="two tables of positions",
    ),
    of_timestep(
        "qwen-image-edit", QwenImageTransformer2DModel, QWEN_SMALL, _edit_inputs, before=EMBEDDER, features=QWEN,
    ),
    of_timestep(
        "qwen-image-edit-2511", QwenImageTransformer2DModel, QWEN_SMALL, _edit_inputs, before=EMBEDDER, features=QWEN,
        published={"zero_cond_t": True}, bitwise_note="twice as many embeddings as rows: those of the picture to edit are of time 0",
    ),
    of_timestep(
        "stable-cascade-prior", StableCascadeUNet, {**_CASCADE_SMALL, "clip_text_in_channels": 20, "clip_image_in_channels": 12},
        lambda real: {
            "sample": noise(2, 16, 24, 24) if real else noise(2, 4, 4, 4), "timestep_ratio": torch.tensor([0.25, 0.75]),
            "clip_text_pooled": noise(2, 1, 1280 if real else 20), "clip_text": noise(2, 77, 1280) if real else noise(2, WORDS, 20),
            "clip_img": noise(2, 1, 768 if real else 12),
        },
        before=(), features=_CASCADE, timestep="timestep_ratio",
        published={**_cascade((_ALL, _ALL)), "clip_text_in_channels": 1280, "clip_image_in_channels": 768, "switch_level": [False]},
        bitwise_note="two more embeddings, of zeros, lie beside that of the timestep",
    ),
    of_timestep(
        "stable-cascade", StableCascadeUNet,
        {**_cascade((_ALL[:2], _ALL)), **_CASCADE_SMALL, "num_attention_heads": (0, 2), "effnet_in_channels": 4,
         "down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (3, 2), "dropout": (0.0, 0.1)},
        lambda real: {
            "sample": noise(2, 4, 256, 256) if real else noise(2, 4, 8, 8), "timestep_ratio": torch.tensor([0.25, 0.75]),
            "clip_text_pooled": noise(2, 1, 1280 if real else 20), "effnet": noise(2, 16, 24, 24) if real else noise(2, 4, 2, 2),
        },
        before=(), features=_CASCADE, timestep="timestep_ratio",
        published={
            **_cascade((_ALL[:2], _ALL[:2], _ALL, _ALL)), "in_channels": 4, "out_channels": 4, "patch_size": 2, "conditioning_dim": 1280,
            "block_out_channels": (320, 640, 1280, 1280), "num_attention_heads": (0, 0, 20, 20),
            "down_num_layers_per_block": (2, 6, 28, 6), "up_num_layers_per_block": (6, 28, 6, 2),
            "down_blocks_repeat_mappers": (1, 1, 1, 1), "up_blocks_repeat_mappers": (3, 3, 2, 2), "effnet_in_channels": 16,
            "pixel_mapper_in_channels": 3, "dropout": (0.0, 0.0, 0.1, 0.1), "timestep_conditioning_type": ("sca",),
        },
        bitwise_note="the blocks on the way up run two and three times",
    ),
    Entry(
        name="unidiffuser",
        build=builder(
            UniDiffuserModel,
            {"text_dim": 64, "clip_img_dim": 512, "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 4,
             "out_channels": 4, "num_layers": 30, "sample_size": 64, "patch_size": 2, "activation_fn": "gelu",
             "use_data_type_embedding": True, "use_timestep_embedding": True},
            {"text_dim": 20, "clip_img_dim": 12, "num_text_tokens": WORDS, "num_attention_heads": 2, "attention_head_dim": 8,
             "num_layers": 3, "sample_size": 8},
        ),
        inputs=lambda real: {
            "latent_image_embeds": noise(2, 4, 64, 64) if real else noise(2, 4, 8, 8), "image_embeds": noise(2, 1, 512 if real else 12),
            "prompt_embeds": noise(2, 77, 64) if real else noise(2, WORDS, 20), "timestep_img": steps(), "timestep_text": 0,
        },
        timestep="timestep_img", features=("timestep_img_embed.linear_2",), layers=pair("timestep_img_embed"), keys=("timestep_img",),
        pure_features=("timestep_img_embed.linear_2",), pure_layers=pair("timestep_img_embed"),
        bitwise_note="a U-ViT: the embedding is a token. Published ones have no layer on it, and no block; here the option is on",
    ),
    Entry(
        name="sd-xl-controlnet",
        build=builder(
            ControlNetModel, _SD_XL_CONTROL,
            {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 20,
             "attention_head_dim": (2, 2, 4), "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 6,
             "projection_class_embeddings_input_dim": 28 + 6 * 6, "conditioning_embedding_out_channels": (8, 8)},
        ),
        inputs=lambda real: {
            "sample": noise(2, 4, 128, 128) if real else noise(2, 4, 8, 8), "timestep": steps(),
            "encoder_hidden_states": noise(2, 77, 2048) if real else noise(2, WORDS, 20),
            "controlnet_cond": noise(2, 3, 1024, 1024) if real else noise(2, 3, 16, 16),
            "added_cond_kwargs": {
                "text_embeds": noise(2, 1280 if real else 28),
                "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024], [768.0, 1344, 16, 64, 768, 1344]]),
            },
            "return_dict": False,
        },
        features=_CONTROL, layers=(*TIME, *ADD, *_CONTROL),
        keys=("timestep", "added_cond_kwargs_text_embeds", "added_cond_kwargs_time_ids"), pure_features=TIME[1:], pure_layers=TIME,
    ),
    of_timestep(
        "animatediff", AnimateDiff,
        {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 20,
         "num_attention_heads": 2, "motion_num_attention_heads": 2, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
         "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
        lambda real: {
            "sample": noise(2, 4, 16, 64, 64) if real else noise(2, 4, 2, 8, 8), "timestep": steps(),
            "encoder_hidden_states": noise(2, 77, 768) if real else noise(2, WORDS, 20),
        },
        before=TIME, features=resnets(down=(1, 1), up=(2, 2)),
        published={"cross_attention_dim": 768},  # the motion modules of SD 1.5
    ),
)  # fmt: skip
