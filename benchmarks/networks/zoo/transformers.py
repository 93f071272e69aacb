"""Transformers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor

from benchmarks.networks.zoo.entry import TIME, Entry, builder, noise, pair, steps

_PIXART: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_SMALL_PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "sample_size": 8,
}

_DIT_FEATURES = (*(f"transformer_blocks.{i}.norm1.linear" for i in range(2)), "proj_out_1")
_DIT_EMBEDDERS = tuple(
    f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_{j}" for i in range(2) for j in (1, 2)
)
_PIXART_TIME = pair("adaln_single.emb.timestep_embedder")
# The output's shift and scale come straight from the embedding, which so is a feature as well.
_PIXART_FEATURES = ("adaln_single.linear", "adaln_single.emb.timestep_embedder.linear_2")
_MMDIT_TIME = pair("time_text_embed.timestep_embedder")
_MMDIT_TEXT = pair("time_text_embed.text_embedder")
_SD3_FEATURES = (
    *(f"transformer_blocks.{i}.{norm}.linear" for i in range(2) for norm in ("norm1", "norm1_context")),
    "norm_out.linear",
)
_FLUX_FEATURES = (
    *(f"transformer_blocks.{i}.{norm}.linear" for i in range(2) for norm in ("norm1", "norm1_context")),
    *(f"single_transformer_blocks.{i}.norm.linear" for i in range(2)),
    "norm_out.linear",
)
_COGVIDEOX_FEATURES = (
    *(f"transformer_blocks.{i}.{norm}.linear" for i in range(2) for norm in ("norm1", "norm2")),
    "norm_out.linear",
)
_WAN_FEATURES = ("condition_embedder.time_proj", "condition_embedder.time_embedder.linear_2")
_WAN_LAYERS = ("condition_embedder.time_embedder.linear_1", *_WAN_FEATURES)


def _pixart_inputs(real: bool, size: int, **more: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, size, size) if real else noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 120, 4096) if real else noise(2, 5, 20),
        "timestep": steps(),
        **more,
        "return_dict": False,
    }


def _flux_inputs(real: bool) -> dict[str, Any]:
    side, text, tokens, width, pooled = (64, 512, 4096, 64, 768) if real else (3, 5, 20, 12, 28)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": noise(2, side * side, width),
        "encoder_hidden_states": noise(2, text, tokens),
        "pooled_projections": noise(2, pooled),
        "timestep": steps(0.017, 0.803),  # forward multiplies by 1000
        "img_ids": torch.stack([torch.zeros_like(x), y, x], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5, 1.5]),
        "return_dict": False,
    }


TRANSFORMERS = (
    Entry(
        name="dit",
        build=builder(
            DiTTransformer2DModel,
            {
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "attention_bias": True,
                "sample_size": 32,
                "patch_size": 2,
                "activation_fn": "gelu-approximate",
                "num_embeds_ada_norm": 1000,
                "norm_type": "ada_norm_zero",
                "norm_elementwise_affine": False,
            },
            {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 2,
                "sample_size": 8,
                "num_embeds_ada_norm": 10,
            },
        ),
        inputs=lambda real: {
            "hidden_states": noise(2, 4, 32, 32) if real else noise(2, 4, 8, 8),
            "timestep": steps(),
            "class_labels": torch.tensor([3, 7]),
            "return_dict": False,
        },
        features=_DIT_FEATURES,
        layers=(*_DIT_EMBEDDERS, *_DIT_FEATURES),
        keys=("timestep", "class_labels"),
        pure_features=tuple(f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2" for i in range(2)),
        pure_layers=_DIT_EMBEDDERS,
        bitwise_note="every block embeds the timestep itself; block 0's embedder runs a second time, for proj_out_1",
    ),
    Entry(
        name="pixart-512",
        build=builder(
            PixArtTransformer2DModel,
            {**_PIXART, "sample_size": 64, "use_additional_conditions": False},
            _SMALL_PIXART,
        ),
        inputs=lambda real: _pixart_inputs(real, 64),
        features=_PIXART_FEATURES,
        layers=(*_PIXART_TIME, "adaln_single.linear"),
        keys=("timestep",),
        pure_features=_PIXART_FEATURES,
        pure_layers=(*_PIXART_TIME, "adaln_single.linear"),
        bitwise_note="timestep_embedder.linear_2 is a feature and also feeds another, adaln_single.linear",
    ),
    Entry(
        name="pixart-1024",
        build=builder(
            PixArtTransformer2DModel,
            {**_PIXART, "sample_size": 128, "use_additional_conditions": True},
            _SMALL_PIXART,
        ),
        inputs=lambda real: _pixart_inputs(
            real,
            128,
            added_cond_kwargs={
                "resolution": torch.tensor([[1024.0, 1024.0], [768.0, 1344.0]]),
                "aspect_ratio": torch.tensor([[1.0], [0.57]]),
            },
        ),
        features=_PIXART_FEATURES,
        layers=(
            *_PIXART_TIME,
            *pair("adaln_single.emb.resolution_embedder"),
            *pair("adaln_single.emb.aspect_ratio_embedder"),
            "adaln_single.linear",
        ),
        keys=("timestep", "added_cond_kwargs_resolution", "added_cond_kwargs_aspect_ratio"),
        pure_features=("adaln_single.emb.timestep_embedder.linear_2",),
        pure_layers=_PIXART_TIME,
        bitwise_note="the embedding that meets data at the output is timestep_embedder.linear_2's output plus the"
        " concatenated outputs of resolution_embedder.linear_2 and aspect_ratio_embedder.linear_2; these two are"
        " layers of conditioning alone and so no features",
    ),
    Entry(
        name="sd-3",
        build=builder(
            SD3Transformer2DModel,
            {
                "sample_size": 128,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 192,
            },
            {
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 12,
                "num_attention_heads": 2,
                "joint_attention_dim": 20,
                "caption_projection_dim": 24,
                "pooled_projection_dim": 28,
                "pos_embed_max_size": 8,
            },
        ),
        inputs=lambda real: {
            "hidden_states": noise(2, 16, 128, 128) if real else noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 154, 4096) if real else noise(2, 5, 20),
            "pooled_projections": noise(2, 2048 if real else 28),
            "timestep": steps(17.5, 803.25),
            "return_dict": False,
        },
        features=_SD3_FEATURES,
        layers=(*_MMDIT_TIME, *_MMDIT_TEXT, *_SD3_FEATURES),
        keys=("timestep", "pooled_projections"),
        pure_features=("time_text_embed.timestep_embedder.linear_2",),
        pure_layers=_MMDIT_TIME,
        bitwise_note="float timesteps",
    ),
    Entry(
        name="flux",
        build=builder(
            FluxTransformer2DModel,
            {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": (16, 56, 56),
            },
            {
                "in_channels": 12,
                "num_layers": 2,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 20,
                "pooled_projection_dim": 28,
                "axes_dims_rope": (4, 6, 6),
            },
        ),
        inputs=_flux_inputs,
        features=_FLUX_FEATURES,
        layers=(*_MMDIT_TIME, *pair("time_text_embed.guidance_embedder"), *_MMDIT_TEXT, *_FLUX_FEATURES),
        keys=("timestep", "pooled_projections", "guidance"),
        pure_features=("time_text_embed.timestep_embedder.linear_2",),
        pure_layers=_MMDIT_TIME,
        bitwise_note="float timesteps in [0, 1]; img_ids and txt_ids have no batch dimension",
    ),
    Entry(
        name="cogvideox",
        build=builder(
            CogVideoXTransformer3DModel,
            {
                "num_attention_heads": 30,
                "attention_head_dim": 64,
                "in_channels": 16,
                "out_channels": 16,
                "flip_sin_to_cos": True,
                "freq_shift": 0,
                "time_embed_dim": 512,
                "text_embed_dim": 4096,
                "num_layers": 30,
                "attention_bias": True,
                "sample_width": 90,
                "sample_height": 60,
                "sample_frames": 49,
                "patch_size": 2,
                "temporal_compression_ratio": 4,
                "max_text_seq_length": 226,
                "spatial_interpolation_scale": 1.875,
            },
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 20,
                "text_embed_dim": 28,
                "num_layers": 2,
                "sample_width": 6,
                "sample_height": 4,
                "sample_frames": 9,
                "max_text_seq_length": 5,
            },
        ),
        inputs=lambda real: {
            "hidden_states": noise(2, 13, 16, 60, 90) if real else noise(2, 3, 4, 4, 6),
            "encoder_hidden_states": noise(2, 226, 4096) if real else noise(2, 5, 28),
            "timestep": steps(),
            "return_dict": False,
        },
        features=_COGVIDEOX_FEATURES,
        layers=(*TIME, *_COGVIDEOX_FEATURES),
        keys=("timestep",),
        pure_features=_COGVIDEOX_FEATURES,
        pure_layers=(*TIME, *_COGVIDEOX_FEATURES),
    ),
    Entry(
        name="wan",
        build=builder(
            WanTransformer3DModel,
            {
                "patch_size": (1, 2, 2),
                "num_attention_heads": 12,
                "attention_head_dim": 128,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 4096,
                "freq_dim": 256,
                "ffn_dim": 8960,
                "num_layers": 30,
                "cross_attn_norm": True,
                "rope_max_seq_len": 1024,
            },
            {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": 20,
                "freq_dim": 36,
                "ffn_dim": 56,
                "num_layers": 2,
                "rope_max_seq_len": 32,
            },
        ),
        inputs=lambda real: {
            "hidden_states": noise(2, 16, 21, 60, 104) if real else noise(2, 4, 3, 4, 6),
            "timestep": steps(),
            "encoder_hidden_states": noise(2, 512, 4096) if real else noise(2, 5, 20),
            "return_dict": False,
        },
        features=_WAN_FEATURES,
        layers=_WAN_LAYERS,
        keys=("timestep",),
        pure_features=_WAN_FEATURES,
        pure_layers=_WAN_LAYERS,
        bitwise_note="time_embedder.linear_2's output passes type_as(encoder_hidden_states), which takes the data's"
        " dtype and none of its values; it is a feature and also feeds another, time_proj; one feature serves"
        " every block, each adding a table of its own",
    ),
)
