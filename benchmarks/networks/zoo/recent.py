"""Transformers of 2024 to 2026 and the prior of unCLIP, at reduced and published sizes.

diffusers' defaults are the published sizes, unless an entry says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    CosmosTransformer3DModel,
    Flux2Transformer2DModel,
    Kandinsky5Transformer3DModel,
    LTXVideoTransformer3DModel,
    PriorTransformer,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    ZImageTransformer2DModel,
)

from benchmarks.networks.zoo.entry import FLOAT, TIME, WORDS, Entry, builder, noise, of_timestep, pair, steps

EMBEDDER = pair("time_text_embed.timestep_embedder")
_SINGLE = pair(
    "time_embed.emb.timestep_embedder"
)  # diffusers' AdaLayerNormSingle: its own output is a feature as well


def _of_images(
    channels: int, width: int, *, text: int = 20, scale: float = 1.0
) -> Callable[[bool], dict[str, Any]]:
    """Latents (N, C, H, W), a prompt, and a float timestep. channels, width: of the published latents and prompts."""
    return lambda real: {
        "hidden_states": noise(2, channels, 128, 128) if real else noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 256, width) if real else noise(2, WORDS, text),
        "timestep": FLOAT * scale,
    }


def _tokens(channels: int, width: int, real: bool, *, small: int) -> dict[str, Any]:
    """Latents as tokens (N, L, C), and a prompt."""
    return {
        "hidden_states": noise(2, 4096, channels) if real else noise(2, 16, small),
        "encoder_hidden_states": noise(2, 256, width) if real else noise(2, WORDS, 20),
        "timestep": FLOAT / 1000,
    }


def _flux2_inputs(real: bool) -> dict[str, Any]:
    found = _tokens(128, 15360, real, small=12)
    ids = {
        "img_ids": torch.zeros(4096 if real else 16, 4),
        "txt_ids": torch.zeros(256 if real else WORDS, 4),
    }
    return {**found, **ids, "guidance": torch.tensor([3.5, 4.0]), "return_dict": False}


def _qwen_inputs(real: bool) -> dict[str, Any]:
    found = _tokens(64, 3584, real, small=16)
    mask = torch.ones(found["encoder_hidden_states"].shape[:2], dtype=torch.long)
    return {
        **found,
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, 64, 64) if real else (1, 4, 4)]] * 2,
    }


def _ltx_inputs(real: bool) -> dict[str, Any]:
    frames, side = (7, 16) if real else (2, 2)
    return {
        "hidden_states": noise(2, frames * side * side, 128 if real else 4),
        "encoder_hidden_states": noise(2, 128, 4096) if real else noise(2, WORDS, 20),
        "timestep": FLOAT,
        "encoder_attention_mask": torch.ones(2, 128 if real else WORDS),
        "num_frames": frames, "height": side, "width": side,
    }  # fmt: skip


def _sizes(value: float) -> torch.Tensor:
    return torch.full((2, 2), value)


_AURA = ("joint_transformer_blocks.0.norm1.linear", "joint_transformer_blocks.0.norm1_context.linear", "single_transformer_blocks.0.norm1.linear", "norm_out.linear")  # fmt: skip
_FLUX2 = ("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear", "single_stream_modulation.linear", "norm_out.linear")  # fmt: skip
_FLUX2_TIME = pair("time_guidance_embed.timestep_embedder")
QWEN_SMALL = {
    "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 20, "axes_dims_rope": (8, 4, 4),
}  # fmt: skip
QWEN = (*(f"transformer_blocks.{i}.{m}_mod.1" for i in range(2) for m in ("img", "txt")), "norm_out.linear")
_COGVIEW4 = ("transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear", "norm_out.linear")
_COGVIEW4_TIME = pair("time_condition_embed.timestep_embedder")
_KANDINSKY5_TIME = ("time_embeddings.in_layer", "time_embeddings.out_layer")
_KANDINSKY5 = (
    "text_transformer_blocks.0.text_modulation.out_layer",
    "visual_transformer_blocks.0.visual_modulation.out_layer",
    "visual_transformer_blocks.1.visual_modulation.out_layer",
    "out_layer.modulation.out_layer",
)
_COSMOS_NORMS = (*(f"transformer_blocks.{i}.norm{k}" for i in range(2) for k in (1, 2, 3)), "norm_out")

_ZIMAGE = (
    *tuple(f"{part}.0.adaLN_modulation.0" for part in ("noise_refiner", "layers")),
    "all_final_layer.2-1.adaLN_modulation.1",
)

RECENT = (
    of_timestep(
        "auraflow", AuraFlowTransformer2DModel,
        {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
         "joint_attention_dim": 20, "caption_projection_dim": 16, "pos_embed_max_size": 16},
        _of_images(4, 2048, scale=1e-3), before=pair("time_step_proj"), features=_AURA,
    ),
    Entry(
        name="flux-2",
        build=builder(
            Flux2Transformer2DModel, {},
            {"in_channels": 12, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
             "joint_attention_dim": 20, "timestep_guidance_channels": 24, "axes_dims_rope": (4, 4, 4, 4)},
        ),
        inputs=_flux2_inputs,
        features=_FLUX2,
        layers=(*_FLUX2_TIME, *pair("time_guidance_embed.guidance_embedder"), *_FLUX2),
        keys=("timestep", "guidance"),
        pure_features=("time_guidance_embed.timestep_embedder.linear_2",),
        pure_layers=_FLUX2_TIME,
        bitwise_note="one modulation for all blocks of a kind",
    ),
    of_timestep(
        "qwen-image", QwenImageTransformer2DModel, QWEN_SMALL, _qwen_inputs, before=EMBEDDER, features=QWEN,
    ),
    Entry(
        name="cogview4",
        build=builder(
            CogView4Transformer2DModel, {},
            {"in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "out_channels": 4,
             "text_embed_dim": 20, "time_embed_dim": 24, "condition_dim": 2},
        ),
        inputs=lambda real: {
            **_of_images(16, 4096)(real), "original_size": _sizes(1024.0), "target_size": _sizes(1024.0), "crop_coords": _sizes(0.0),
            "return_dict": False,
        },
        features=_COGVIEW4,
        layers=(*_COGVIEW4_TIME, *pair("time_condition_embed.condition_embedder"), *_COGVIEW4),
        keys=("timestep", "original_size", "target_size", "crop_coords"),
        pure_features=("time_condition_embed.timestep_embedder.linear_2",),
        pure_layers=_COGVIEW4_TIME,
    ),
    of_timestep(
        "ltx", LTXVideoTransformer3DModel,
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
         "num_layers": 2, "caption_channels": 20},
        _ltx_inputs, before=_SINGLE[:1], features=(_SINGLE[1], "time_embed.linear"),
    ),
    of_timestep(
        "sana", SanaTransformer2DModel,
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 20, "sample_size": 8},
        _of_images(32, 2304), before=_SINGLE[:1], features=(_SINGLE[1], "time_embed.linear"),
    ),
    Entry(
        name="kandinsky-5",
        build=builder(
            Kandinsky5Transformer3DModel, {},
            {"in_text_dim": 20, "in_text_dim2": 28, "time_dim": 24, "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1,
             "num_visual_blocks": 2, "axes_dims": (2, 2, 4)},
        ),
        inputs=lambda real: {
            "hidden_states": noise(2, 5, 32, 32, 4) if real else noise(2, 3, 8, 6, 4),
            "encoder_hidden_states": noise(2, 256, 3584) if real else noise(2, WORDS, 20),
            "timestep": FLOAT,
            "pooled_projections": noise(2, 768 if real else 28),
            "visual_rope_pos": [torch.arange(n) for n in ((5, 16, 16) if real else (3, 4, 3))],
            "text_rope_pos": torch.arange(256 if real else WORDS),
            "return_dict": False,
        },
        features=_KANDINSKY5,
        layers=(*_KANDINSKY5_TIME, "pooled_text_embeddings.in_layer", *_KANDINSKY5),
        keys=("timestep", "pooled_projections"),
        pure_features=_KANDINSKY5_TIME[1:],
        pure_layers=_KANDINSKY5_TIME,
        bitwise_note="the places of frames, rows and columns have no batch",
    ),
    of_timestep(
        "cosmos", CosmosTransformer3DModel,
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2.0,
         "text_embed_dim": 20, "adaln_lora_dim": 4, "max_size": (4, 8, 8)},
        lambda real: {
            "hidden_states": noise(2, 16, 4, 64, 64) if real else noise(2, 4, 2, 4, 4),
            "timestep": FLOAT,
            "encoder_hidden_states": noise(2, 512, 1024) if real else noise(2, WORDS, 20),
        },
        before=("time_embed.t_embedder.linear_1", *(f"{n}.linear_1" for n in _COSMOS_NORMS)),
        features=("time_embed.t_embedder.linear_2", *(f"{n}.linear_2" for n in _COSMOS_NORMS)),
        published={"extra_pos_embed_type": None, "concat_padding_mask": False},  # Cosmos 2 has no learnable positions
    ),
    of_timestep(
        "unclip-prior", PriorTransformer,
        {"num_attention_heads": 2, "attention_head_dim": 8, "embedding_dim": 20, "num_layers": 2, "num_embeddings": WORDS},
        lambda real: {
            "hidden_states": noise(2, 768 if real else 20), "timestep": steps(), "proj_embedding": noise(2, 768 if real else 20),
            "encoder_hidden_states": noise(2, 77, 768) if real else noise(2, WORDS, 20),
        },
        before=TIME[:1], features=TIME[1:],  # the embedding is a token of its own
    ),
    Entry(
        name="z-image",
        build=builder(
            ZImageTransformer2DModel, {},
            {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 20,
             "axes_dims": [8, 4, 4], "axes_lens": [64, 16, 16]},
        ),
        inputs=lambda real: {
            "x": list(noise(2, 16, 1, 128, 128) if real else noise(2, 4, 1, 8, 8)),
            "t": torch.tensor([0.25, 0.75]),
            "cap_feats": list(noise(2, 250, 2560) if real else noise(2, WORDS, 20)),
            "return_dict": False,
        },
        timestep="t",
        features=_ZIMAGE,
        layers=("t_embedder.mlp.0", "t_embedder.mlp.2", *_ZIMAGE),
        keys=("t",),
        pure_features=_ZIMAGE,
        pure_layers=("t_embedder.mlp.0", "t_embedder.mlp.2", *_ZIMAGE),
    ),
)  # fmt: skip
