"""U-Nets with text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Kandinsky3UNet, UNet2DConditionModel
from torch import Tensor

from benchmarks.networks.zoo.entry import ADD, TIME, Entry, builder, noise, pair, resnets, steps

_SD1: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
_SD2 = {
    **_SD1,
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
_SD_XL = {
    **_SD1,
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
_X4_UPSCALER = {
    **_SD1,
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "cross_attention_dim": 1024,
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "num_class_embeds": 1000,
    "only_cross_attention": (True, True, True, False),
    "use_linear_projection": True,
}
_SMALL_SD = {
    "sample_size": 8,
    "attention_head_dim": 4,
    "block_out_channels": (16, 24, 40),
    "cross_attention_dim": 20,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_SD_FEATURES = resnets(down=(1, 1, 1), up=(2, 2, 2))


def _text_to_image(
    real: bool, *, published: int, tokens: int, channels: int = 4, **more: Tensor | dict[str, Tensor]
) -> dict[str, Any]:
    """`published` is the size of the published model's latents, `tokens` the width of its text tokens."""
    size, length, width = (published, 77, tokens) if real else (8, 5, 20)
    return {
        "sample": noise(2, channels, size, size),
        "timestep": steps(),
        "encoder_hidden_states": noise(2, length, width),
        **more,
        "return_dict": False,
    }


UNETS_TEXT = (
    Entry(
        name="sd-1.5",
        build=builder(UNet2DConditionModel, _SD1, _SMALL_SD),
        inputs=lambda real: _text_to_image(real, published=64, tokens=768),
        features=_SD_FEATURES,
        layers=(*TIME, *_SD_FEATURES),
        keys=("timestep",),
        pure_features=_SD_FEATURES,
        pure_layers=(*TIME, *_SD_FEATURES),
    ),
    Entry(
        name="sd-2.1",
        build=builder(UNet2DConditionModel, _SD2, {**_SMALL_SD, "attention_head_dim": (2, 3, 5)}),
        inputs=lambda real: _text_to_image(real, published=96, tokens=1024),
        features=_SD_FEATURES,
        layers=(*TIME, *_SD_FEATURES),
        keys=("timestep",),
        pure_features=_SD_FEATURES,
        pure_layers=(*TIME, *_SD_FEATURES),
    ),
    Entry(
        name="sd-xl",
        build=builder(
            UNet2DConditionModel,
            _SD_XL,
            {
                **_SMALL_SD,
                "attention_head_dim": (2, 3, 5),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 1, 2),
                "addition_time_embed_dim": 6,
                "projection_class_embeddings_input_dim": 28 + 6 * 6,
            },
        ),
        inputs=lambda real: _text_to_image(
            real,
            published=128,
            tokens=2048,
            added_cond_kwargs={
                "text_embeds": noise(2, 1280 if real else 28),
                "time_ids": torch.tensor(
                    [[1024.0, 1024, 0, 0, 1024, 1024], [768.0, 1344, 16, 64, 768, 1344]]
                ),
            },
        ),
        features=_SD_FEATURES,
        layers=(*TIME, *ADD, *_SD_FEATURES),
        keys=("timestep", "added_cond_kwargs_text_embeds", "added_cond_kwargs_time_ids"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=TIME,
    ),
    Entry(
        name="lcm",
        build=builder(
            UNet2DConditionModel,
            {**_SD1, "sample_size": 96, "time_cond_proj_dim": 256},
            {**_SMALL_SD, "time_cond_proj_dim": 12},
        ),
        inputs=lambda real: _text_to_image(
            real, published=96, tokens=768, timestep_cond=noise(2, 256 if real else 12)
        ),
        features=_SD_FEATURES,
        layers=("time_embedding.cond_proj", *TIME, *_SD_FEATURES),
        keys=("timestep", "timestep_cond"),
        pure_features=(),
        pure_layers=(),
        bitwise_note="the guidance embedding is added to the sinusoid, ahead of every weighted layer, so that no"
        " layer depends on the timestep alone",
    ),
    Entry(
        name="sd-x4-upscaler",
        build=builder(
            UNet2DConditionModel,
            _X4_UPSCALER,
            {
                **_SMALL_SD,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "only_cross_attention": (True, True, False),
                "num_class_embeds": 10,
            },
        ),
        inputs=lambda real: _text_to_image(
            real, published=128, tokens=1024, channels=7, class_labels=torch.tensor([3, 7])
        ),
        features=_SD_FEATURES,
        layers=(*TIME, *_SD_FEATURES),
        keys=("timestep", "class_labels"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=TIME,
        bitwise_note="the labels (noise levels) go through an nn.Embedding, which is no weighted layer",
    ),
    Entry(
        name="sd-unclip",
        build=builder(
            UNet2DConditionModel,
            {**_SD2, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
            {**_SMALL_SD, "attention_head_dim": (2, 3, 5), "projection_class_embeddings_input_dim": 28},
        ),
        inputs=lambda real: _text_to_image(
            real, published=96, tokens=1024, class_labels=noise(2, 2048 if real else 28)
        ),
        features=_SD_FEATURES,
        layers=(*TIME, *pair("class_embedding"), *_SD_FEATURES),
        keys=("timestep", "class_labels"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=TIME,
        bitwise_note="class_labels is an image embedding, a float vector per sample",
    ),
)

# Kandinsky 3 adds attention-pooled text tokens to the time embedding: data meets it right behind linear_2, and
# the 60-odd Linears that turn the sum into scales and shifts are no part of the block.
UNET_KANDINSKY3 = Entry(
    name="kandinsky-3",
    build=builder(
        Kandinsky3UNet,
        {
            "in_channels": 4,
            "time_embedding_dim": 1536,
            "groups": 32,
            "attention_head_dim": 64,
            "layers_per_block": 3,
            "block_out_channels": (384, 768, 1536, 3072),
            "cross_attention_dim": 4096,
            "encoder_hid_dim": 4096,
        },
        {
            "time_embedding_dim": 20,
            "groups": 4,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (16, 24, 32, 40),
            "cross_attention_dim": 28,
            "encoder_hid_dim": 12,
        },
    ),
    inputs=lambda real: {
        "sample": noise(2, 4, 128, 128) if real else noise(2, 4, 8, 8),
        "timestep": steps(),
        "encoder_hidden_states": noise(2, 128, 4096) if real else noise(2, 5, 12),
        "encoder_attention_mask": torch.arange(128 if real else 5).ge(torch.tensor([[1], [2]])).long(),
        "return_dict": False,
    },
    features=("time_embedding.linear_2",),
    layers=TIME,
    keys=("timestep",),
    pure_features=("time_embedding.linear_2",),
    pure_layers=TIME,
    bitwise_note="text tokens are pooled into the time embedding, so that its projections are data",
)
