"""Make a tiny instance of each component that a diffusers pipeline asks for, by the class in its signature.

`COMPONENTS` says which values of a class's config make it small. A few pipelines need other values (the channels of a
mask, two text encoders side by side): `OF_PIPELINE`, and the arguments of their calls: `CALLS`.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from torch import nn

from benchmarks.networks.pipelines import LENGTH, clip_encoder, clip_tokenizer, t5_tokenizer

TEXT = 16  # width of every text encoder's tokens
PIXELS = 16  # height and width of what is drawn; latents have half of it

_SIZE = {"size": {"height": PIXELS, "width": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
_SD = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT,
}  # fmt: skip
_XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + TEXT,
    "cross_attention_dim": 2 * TEXT, "use_linear_projection": True, "transformer_layers_per_block": 1,
}  # fmt: skip
_CONTROL = {n: x for n, x in _SD.items() if not n.startswith(("up_", "sample"))} | {
    "conditioning_embedding_out_channels": (8, 8)
}
_VAE_2D = {
    "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4, "norm_num_groups": 4, "sample_size": PIXELS, "layers_per_block": 1,
}  # fmt: skip
_VAE_8 = {  # latents have an eighth of the height and width
    "block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_UNET_3D = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": TEXT,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}  # fmt: skip
_FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": TEXT, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 8, "joint_attention_dim": 2 * TEXT, "caption_projection_dim": 16, "pooled_projection_dim": 2 * TEXT,
    "pos_embed_max_size": 16,
}  # fmt: skip
_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": TEXT, "ffn_dim": 32, "num_layers": 2,
    "in_channels": 16, "out_channels": 16, "freq_dim": 16,
}  # fmt: skip
_COG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": TEXT, "num_layers": 1, "sample_width": 2, "sample_height": 2, "sample_frames": 5, "max_text_seq_length": LENGTH,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT, "pooled_projection_dim": TEXT, "rope_axes_dim": (2, 2, 4),
}  # fmt: skip
# Its pictures have 1024 x 1024 pixels or more, whatever is asked for.
_JOY = {
    "patch_size": [1, 16, 16], "hidden_size": 32, "num_attention_heads": 2, "text_dim": TEXT, "mlp_width_ratio": 2.0, "num_layers": 2,
    "rope_dim_list": [4, 4, 8],
}  # fmt: skip
_CASCADE = {
    "block_out_channels": (8, 8), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1), "conditioning_dim": 16, "clip_text_pooled_in_channels": TEXT,
    "timestep_ratio_embedding_dim": 8,
}  # fmt: skip
_TRANSFORMER_XL = {
    "hidden_size": TEXT,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_LLM = {
    **_TRANSFORMER_XL,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}

# Values of the config by class: diffusers' models, then transformers'.
COMPONENTS: dict[str, dict[str, Any]] = {
    "AceStepConditionEncoder": {
        "hidden_size": 32, "intermediate_size": 32, "text_hidden_dim": TEXT, "timbre_hidden_dim": 4, "num_lyric_encoder_hidden_layers": 2,
        "num_timbre_encoder_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4,
    },
    "AceStepTransformer1DModel": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 4,
    },
    "AllegroTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1, "cross_attention_dim": 48, "sample_width": 8,
        "sample_height": 8, "sample_frames": 2, "caption_channels": TEXT,
    },
    "AnyFlowFARTransformer3DModel": {**_WAN, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 2, "chunk_partition": (1, 1)},
    "AnyFlowTransformer3DModel": {**_WAN},
    "AsymmetricAutoencoderKL": {},
    "AudioLDM2ProjectionModel": {"text_encoder_dim": TEXT, "text_encoder_1_dim": TEXT, "langauge_model_dim": TEXT},
    "AudioLDM2UNet2DConditionModel": {**_SD, "cross_attention_dim": (TEXT, TEXT)},
    "AuraFlowTransformer2DModel": {
        "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
        "joint_attention_dim": TEXT, "caption_projection_dim": 32, "pos_embed_max_size": 64,
    },
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8), "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
        "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "downsample_block_type": "conv",
        "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
    },
    "AutoencoderKL": {**_VAE_2D, "shift_factor": 0.0},
    "AutoencoderKLAllegro": {
        "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
    },
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    },
    "AutoencoderKLCosmos": {
        "encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8), "resolution": 16, "num_layers": 1,
        "attention_resolutions": (8,), "latents_mean": [0.0] * 128, "latents_std": [1.0] * 128,
    },
    "AutoencoderKLFlux2": {**_VAE_2D},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64, 64), "layers_per_block": 1,
        "spatial_compression_ratio": 4, "sample_size": 16, "scaling_factor": 0.5,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": 4, "block_out_channels": (16, 16, 16, 16, 16), "layers_per_block": 1,
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (16, 16, 16, 16, 16), "layers_per_block": 1,
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 8, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "latent_channels": 2, "resolution": 32, "mel_bins": 16,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 4, "block_out_channels": (8, 8), "down_block_types": ("LTX2VideoDownBlock3D",) * 2, "decoder_block_out_channels": (8, 16),
        "layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1), "spatio_temporal_scaling": (True, True),
        "decoder_spatio_temporal_scaling": (True, True), "decoder_inject_noise": (False,) * 3, "downsample_type": ("spatial", "spatiotemporal"),
        "upsample_type": ("spatiotemporal", "spatial"), "upsample_residual": (True, True), "upsample_factor": (2, 2), "patch_size": 1,
        "spatial_compression_ratio": 4, "temporal_compression_ratio": 2,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1), "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False), "patch_size": 1,
    },
    "AutoencoderKLMagvit": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "spatial_group_norm": False,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 32, 32, 32), "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False],
        "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    },
    "AutoencoderKLQwenImage21": {
        "base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False],
        "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "scale_factor_temporal": 1, "scale_factor_spatial": 2,
    },
    "AutoencoderKLTemporalDecoder": {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
    "AutoencoderKLWan": {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "AutoencoderOobleck": {
        "encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "channel_multiples": [1, 2], "decoder_channels": 8,
        "decoder_input_channels": 4, "sampling_rate": 32,
    },
    "AutoencoderSAME": {
        "patch_size": 8, "encoder_channels": 8, "encoder_c_mults": (2,), "encoder_strides": (2,), "encoder_transformer_depths": (1,),
        "latent_dim": 8, "dim_heads": 8, "sampling_rate": 64,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1),
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": TEXT, "injection_layer_ids": (1,),
        "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 2,
        "gist_max_text_len": 16, "axes_dims": (4, 4, 8), "axes_lens": (64, 64, 64),
    },
    "BriaFiboTransformer2DModel": {
        **_FLUX, "axes_dims_rope": (4, 4, 8), "text_encoder_dim": TEXT // 2, "pooled_projection_dim": None, "in_channels": 16,
    },
    "BriaTransformer2DModel": {**_FLUX, "pooled_projection_dim": None},
    "ClapTextModelWithProjection": {
        **_TRANSFORMER_XL, "projection_dim": TEXT, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    },
    "CLIPImageProjection": {"hidden_size": TEXT},
    "ChromaTransformer2DModel": {
        **_FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1,
    },
    "ChronoEditTransformer3DModel": {**_WAN, "in_channels": 36, "image_dim": TEXT},
    "CogVideoXTransformer3DModel": {**_COG},
    "CogView3PlusTransformer2DModel": {
        "in_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "out_channels": 4,
        "text_embed_dim": TEXT, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8, "sample_size": 8,
    },
    "CogView4Transformer2DModel": {
        "in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "out_channels": 4,
        "text_embed_dim": TEXT, "time_embed_dim": 8, "condition_dim": 2,
    },
    "ControlNetModel": {**_CONTROL},
    "ControlNetUnionModel": {**_CONTROL, "num_control_type": 2, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8, "addition_embed_type": "text_time"},
    "ControlNetXSAdapter": {
        "block_out_channels": (4, 8), "base_block_out_channels": (8, 16), "down_block_types": _SD["down_block_types"], "cross_attention_dim": TEXT,
        "conditioning_embedding_out_channels": (8, 8), "num_attention_heads": 2, "max_norm_num_groups": 4,
    },
    "CosmosControlNetModel": {
        "n_controlnet_blocks": 2, "model_channels": 32, "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2.0,
        "text_embed_dim": TEXT, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "encoder_hidden_states_channels": TEXT,
    },
    "CosmosTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2.0, "text_embed_dim": TEXT,
        "adaln_lora_dim": 4, "max_size": (4, 32, 32), "encoder_hidden_states_channels": TEXT,
    },
    "DiTTransformer2DModel": {
        "sample_size": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "num_embeds_ada_norm": 1000,
    },
    "DreamLiteUNetModel": {
        "sample_size": 8, "block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
        "cross_attention_dim": TEXT, "ff_mult": 2, "use_linear_projection": True,
    },
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 1, "mmdit_layers": 1,
        "time_embed_dim": 8, "text_embed_dim": TEXT, "sample_width": 8, "sample_height": 8, "patch_size": 2,
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 16, "out_channels": 16,
        "text_in_dim": TEXT, "rope_axes_dim": (4, 4, 8),
    },
    "Flux2Transformer2DModel": {
        **_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16,
    },
    "FluxControlNetModel": {**_FLUX, "pooled_projection_dim": TEXT},
    "FluxTransformer2DModel": {**_FLUX, "pooled_projection_dim": TEXT, "guidance_embeds": True},
    "GPT2LMHeadModel": {"n_embd": TEXT, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 64},
    "HeliosTransformer3DModel": {**_WAN, "rope_dim": (4, 4, 4)},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "caption_channels": [TEXT, TEXT], "text_emb_dim": 2 * TEXT, "axes_dims_rope": (8, 4, 4), "max_resolution": (16, 16),
        "llama_layers": (0, 0), "force_inference_output": True,
    },
    "HunyuanDiT2DControlNetModel": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "transformer_num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "hidden_size": 16, "cross_attention_dim": TEXT, "cross_attention_dim_t5": TEXT, "pooled_projection_dim": 16,
        "text_len": LENGTH, "text_len_t5": LENGTH,
    },
    "HunyuanDiT2DModel": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "hidden_size": 16, "cross_attention_dim": TEXT, "cross_attention_dim_t5": TEXT, "pooled_projection_dim": 16,
        "text_len": LENGTH, "text_len_t5": LENGTH,
    },
    "HunyuanImageTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT, "text_embed_2_dim": TEXT, "rope_axes_dim": (4, 4),
    },
    "HunyuanVideo15Transformer3DModel": {
        **{n: x for n, x in _HUNYUAN.items() if n not in ("num_single_layers", "pooled_projection_dim")}, "in_channels": 9,
        "text_embed_2_dim": TEXT, "image_embed_dim": TEXT, "target_size": PIXELS, "task_type": "t2v",
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        **_HUNYUAN, "has_image_proj": True, "image_proj_dim": TEXT, "has_clean_x_embedder": True,
    },
    "HunyuanVideoTransformer3DModel": {**_HUNYUAN},
    "I2VGenXLUNet": {**_UNET_3D, "sample_size": 8, "num_attention_heads": 2},
    "Ideogram4Transformer2DModel": {
        "in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 32, "adaln_dim": 16,
        "llm_features_dim": 13 * TEXT, "mrope_section": (4, 2, 2),
    },
    "JoyImageEditPlusTransformer3DModel": {**_JOY},
    "JoyImageEditTransformer3DModel": {**_JOY},
    "Kandinsky3UNet": {
        "time_embedding_dim": 16, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2, "block_out_channels": (16, 32),
        "cross_attention_dim": 16, "encoder_hid_dim": TEXT,
    },
    "Kandinsky5Transformer3DModel": {
        "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 16, "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1,
        "num_visual_blocks": 2, "axes_dims": (2, 2, 4),
    },
    "Kandinsky6Transformer3DModel": {
        "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 16, "model_dim": 32, "ff_dim": 32,
        "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 8), "in_audio_dim": 8, "out_audio_dim": 8, "model_dim_a": 16,
        "time_dim_a": 16, "ff_dim_a": 16, "axes_dims_a": (2, 2, 4), "visual_token_type_num_embeddings": 2,
    },
    "Krea2Transformer2DModel": {
        "in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32,
        "timestep_embed_dim": 16, "text_hidden_dim": TEXT, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
        "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 4, 8),
    },
    "LearnedClassifierFreeSamplingEmbeddings": {"learnable": True, "hidden_size": TEXT, "length": LENGTH},
    "LongCatAudioDiTTransformer": {
        "dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": TEXT, "latent_dim": 4, "ff_mult": 2.0,
    },
    "LongCatAudioDiTVae": {
        "channels": 8, "c_mults": [1, 2], "strides": [2], "latent_dim": 4, "encoder_latent_dim": 8, "downsampling_ratio": 2, "sample_rate": 16,
    },
    "LTX2LatentUpsamplerModel": {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1},
    "LTX2TextConnectors": {
        "caption_channels": TEXT, "text_proj_in_factor": 2, "video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 8,
        "video_connector_num_layers": 1, "video_connector_num_learnable_registers": LENGTH, "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 8, "audio_connector_num_layers": 1, "audio_connector_num_learnable_registers": LENGTH,
        "connector_rope_base_seq_len": 32, "rope_type": "split",
    },
    "LTX2VideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
        "vae_scale_factors": (2, 4, 4), "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": TEXT, "rope_type": "split",
    },
    "LTX2Vocoder": {
        "in_channels": 32, "hidden_channels": 8, "upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2], "resnet_kernel_sizes": [3],
        "resnet_dilations": [[1, 3]], "output_sampling_rate": 16000,
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
        "num_layers": 1, "caption_channels": TEXT,
    },
    "LatteTransformer3DModel": {
        "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_channels": TEXT,
        "in_channels": 4, "cross_attention_dim": 16, "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 5,
    },
    "LongCatImageTransformer2DModel": {**_FLUX, "pooled_projection_dim": TEXT},
    "Lumina2Transformer2DModel": {
        "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 3,
        "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2), "axes_lens": (128,) * 3, "cap_feat_dim": TEXT,
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 8, "hidden_size": 24, "num_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16,
        "cross_attention_dim": TEXT,
    },
    "MMAudioVAE": {
        "mel_bins": 16, "latent_channels": 8, "hidden_channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1,
    },
    "MMAudioVocoder": {
        "num_mels": 16, "upsample_initial_channel": 8, "upsample_rates": (2, 2), "upsample_kernel_sizes": (4, 4), "resblock_kernel_sizes": (3,),
        "resblock_dilation_sizes": ((1, 3),),
    },
    "MochiTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16, "text_embed_dim": TEXT,
        "time_embed_dim": 4, "max_sequence_length": LENGTH,
    },
    "MotifVideoTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2, "num_decoder_layers": 1, "mlp_ratio": 2.0,
        "text_embed_dim": TEXT, "rope_axes_dim": (4, 4, 8), "enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True,
    },
    "MotionAdapter": {
        "block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 4, "motion_num_attention_heads": 2,
    },
    "OmniGenTransformer2DModel": {
        "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "num_layers": 1, "vocab_size": 100,
        "pad_token_id": 0, "time_step_dim": 16, "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    },
    "OvisImageTransformer2DModel": {**_FLUX, "out_channels": 16},
    "PRXTransformer2DModel": {
        "in_channels": 4, "context_in_dim": TEXT, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "axes_dim": [4, 4],
    },
    "PaellaVQModel": {"bottleneck_blocks": 1, "num_vq_embeddings": 2, "levels": 2, "embed_dim": 4},
    "PixArtTransformer2DModel": {
        "sample_size": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": 16, "caption_channels": TEXT, "use_additional_conditions": False,
    },
    "PriorTransformer": {
        "num_attention_heads": 2, "attention_head_dim": 8, "embedding_dim": TEXT, "num_layers": 1, "num_embeddings": LENGTH,
    },
    "QwenImage21Transformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "context_in_dim": TEXT,
        "axes_dims_rope": (4, 4, 8),
    },
    "QwenImageControlNetModel": {
        "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": TEXT, "axes_dims_rope": (8, 4, 4),
    },
    "NucleusMoEImageTransformer2DModel": {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 1,
        "joint_attention_dim": TEXT, "axes_dims_rope": (4, 6, 6), "num_experts": 4, "moe_intermediate_dim": 32, "capacity_factors": 2.0,
        "dense_moe_strategy": "leave_first_block_dense",
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": TEXT, "axes_dims_rope": (8, 4, 4),
    },
    "SanaWMTransformer3DModel": {
        "in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2, "linear_head_dim": 16,
        "chunk_plucker_channels": 12, "chunk_plucker_post_attn_blocks": 2, "image_size": PIXELS, "caption_channels": TEXT, "mlp_ratio": 2.0,
    },
    "SD3ControlNetModel": {n: x for n, x in _SD3.items() if n != "num_layers"} | {"num_layers": 1},
    "SD3Transformer2DModel": {**_SD3},
    "SanaControlNetModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": TEXT, "sample_size": 8,
    },
    "SanaTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": TEXT, "sample_size": 8,
    },
    "SanaVideoTransformer3DModel": {  # with narrower heads, some token's queries are all negative, and attention divides by zero
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 24, "cross_attention_dim": 48, "caption_channels": TEXT, "sample_size": 8,
    },
    "SkyReelsV2Transformer3DModel": {**_WAN},
    "SparseControlNetModel": {
        **_CONTROL, "motion_num_attention_heads": 2, "use_simplified_condition_embedding": False, "conditioning_channels": 3,
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
    },
    "SpeechT5HifiGan": {
        "model_in_dim": 8, "sampling_rate": 64, "upsample_initial_channel": 8, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]], "normalize_before": False,
    },
    "StableAudio3DiTModel": {
        "io_channels": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "cond_token_dim": TEXT, "global_cond_dim": TEXT, "local_add_cond_dim": 9,
        "timestep_features_dim": 8, "ff_mult": 2.0, "num_memory_tokens": 2,
    },
    "StableAudio3DurationEmbedder": {"output_dim": TEXT, "fourier_dim": 8},
    "StableAudioDiTModel": {
        "sample_size": 4, "in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "out_channels": 4,
        "num_key_value_attention_heads": 2, "cross_attention_dim": 4, "time_proj_dim": 8, "global_states_input_dim": 8, "cross_attention_input_dim": 4,
    },
    "StableAudioProjectionModel": {"text_encoder_dim": TEXT, "conditioning_dim": 4, "min_value": 0, "max_value": 32},
    "StableCascadeUNet": {**_CASCADE},
    "StableUnCLIPImageNormalizer": {"embedding_dim": TEXT},
    "T2IAdapter": {"in_channels": 3, "channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2, "adapter_type": "full_adapter"},
    "Transformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_vector_embeds": 17, "sample_size": 8, "num_embeds_ada_norm": 100,
        "norm_num_groups": 4, "cross_attention_dim": TEXT, "attention_bias": True, "activation_fn": "geglu-approximate",
    },
    "UnCLIPTextProjModel": {"clip_embeddings_dim": TEXT, "time_embed_dim": 4 * 8, "cross_attention_dim": TEXT},
    "UNet1DModel": {"sample_size": 64, "block_out_channels": (32, 32, 32), "extra_in_channels": 64, "sample_rate": 64},
    "UNet2DConditionModel": {**_SD},
    "UNet2DModel": {
        "sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    },
    "UNet3DConditionModel": {**_UNET_3D},
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": TEXT, "num_attention_heads": 2,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), "sample_size": 8,
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "projection_class_embeddings_input_dim": 24,
        "addition_time_embed_dim": 8,
    },
    "UVit2DModel": {
        "hidden_size": 16, "cond_embed_dim": TEXT, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10, "encoder_hidden_size": TEXT,
        "vocab_size": 32, "codebook_size": 16, "in_channels": 8, "block_out_channels": 8, "num_res_blocks": 1, "downsample": True,
        "upsample": True, "block_num_heads": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "sample_size": 8,
    },
    "VQModel": {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4, "num_vq_embeddings": 16, "norm_num_groups": 4, "vq_embed_dim": 4,
    },
    "WanAnimateTransformer3DModel": {**_WAN, "in_channels": 36, "latent_channels": 16},
    "WanTransformer3DModel": {**_WAN},
    "WanVACETransformer3DModel": {**_WAN, "vace_layers": [0], "vace_in_channels": 96},
    "WuerstchenDiffNeXt": {
        "c_cond": 4, "c_hidden": [8, 8], "nhead": [-1, 2], "blocks": [1, 1], "level_config": ["CT", "CTA"], "inject_effnet": [False, True],
        "effnet_embd": 16, "clip_embd": TEXT, "c_r": 8,
    },
    "WuerstchenPrior": {"c_in": 2, "c": 8, "depth": 2, "c_cond": TEXT, "c_r": 8, "nhead": 2},
    "ZImageControlNetModel": {
        "control_layers_places": [0, 1], "control_refiner_layers_places": [0], "control_in_dim": 4, "add_control_noise_refiner": "control_noise_refiner",
        "dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    },
    "ZImageTransformer2DModel": {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": TEXT, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
    },
}  # fmt: skip

_FLOW = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler}
# By a pattern of the pipeline's name: other values of its components' configs, or how one is made.
OF_PIPELINE: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        r"XL",
        {"UNet2DConditionModel": _XL, "ControlNetModel": _XL, "ControlNetUnionModel": _XL, "ControlNetXSAdapter": {"cross_attention_dim": 32}},
    ),
    (r"Kolors", {"UNet2DConditionModel": {**_XL, "cross_attention_dim": TEXT}}),
    (r"StableDiffusionInpaintPipeline$", {"UNet2DConditionModel": {"in_channels": 9}}),
    (r"InstructPix2Pix|Marigold(Depth|Normals)", {"UNet2DConditionModel": {"in_channels": 8}}),
    # It scales its picture to 224 x 224 itself.
    (r"StableVideoDiffusion", {"CLIPVisionModelWithProjection": {"image_size": 224, "patch_size": 112}}),
    (r"MarigoldIntrinsics", {"UNet2DConditionModel": {"in_channels": 12, "out_channels": 8}}),
    (r"StableDiffusionUpscale", {"UNet2DConditionModel": {"in_channels": 7, "num_class_embeds": 1000}}),
    (r"FluxControl(Img2Img|Inpaint)?Pipeline", {"FluxTransformer2DModel": {"in_channels": 32, "out_channels": 16}}),
    (r"FluxFill|VisualCloze", {"FluxTransformer2DModel": {"in_channels": 48, "out_channels": 16}}),
    # With the scheduler's own default, its last step divides by zero.
    (r"CycleDiffusion", {"scheduler": partial(diffusers.DDIMScheduler, set_alpha_to_one=False)}),
    (r"LDMSuperResolution", {
        "UNet2DModel": {"in_channels": 6, "out_channels": 3}, "VQModel": {"latent_channels": 3, "vq_embed_dim": 3}}),
    (r"^LDMPipeline|LatentUp", {"UNet2DModel": {"in_channels": 4, "out_channels": 4}}),
    (r"LatentConsistency", {"UNet2DConditionModel": {"time_cond_proj_dim": 8}}),
    (r"Adapter", {"UNet2DConditionModel": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}}),
    (r"^PIA", {"UNet2DConditionModel": {"in_channels": 9}}),
    (r"StableDiffusion3(ControlNet)?Inpaint", {
        "SD3Transformer2DModel": {"in_channels": 16, "out_channels": 16}, "AutoencoderKL": {"latent_channels": 16},
        "SD3ControlNetModel": {"in_channels": 16, "extra_conditioning_channels": 1}}),
    (r"Amused", {"scheduler": lambda: diffusers.AmusedScheduler(mask_token_id=31)}),
    (r"DanceDiffusion", {"scheduler": diffusers.IPNDMScheduler}),
    (r"ModelEditing|^PNDM", {"scheduler": partial(diffusers.PNDMScheduler, skip_prk_steps=True)}),
    (r"Paradigms", {"scheduler": diffusers.DDIMParallelScheduler}),
    (r"LEditsPP", {"scheduler": partial(diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", solver_order=2)}),
    (r"StableDiffusionLatentUpscale", {
        "scheduler": diffusers.EulerDiscreteScheduler,
        "UNet2DConditionModel": {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 128 + TEXT}}),
    (r"GLIGEN", {"UNet2DConditionModel": {"attention_type": "gated"}}),
    (r"GLIGENTextImage", {
        "UNet2DConditionModel": {"attention_type": "gated-text-image"}, "processor": lambda: transformers.CLIPImageProcessor(**_SIZE)}),
    (r"ControlNetXS", {"UNet2DConditionModel": {"layers_per_block": 2, "use_linear_projection": True}}),
    (r"WuerstchenCombined", {"WuerstchenPrior": {"c_in": 16}}),
    (r"^Kandinsky(Img2Img|Inpaint)?(Combined)?Pipeline", {"UNet2DConditionModel": {
        "addition_embed_type": "text_image", "encoder_hid_dim": TEXT, "encoder_hid_dim_type": "text_image_proj", "out_channels": 8}}),
    (r"^KandinskyInpaint", {"UNet2DConditionModel": {"in_channels": 9}}),
    (r"SanaVideo|SanaImageToVideo", {
        "vae": lambda: diffusers.AutoencoderKLWan(**COMPONENTS["AutoencoderKLWan"]).eval(), **_FLOW}),
    (r"Cosmos", {"safety_checker": lambda: Passing()}),
    # With other sigmas, which start at zero, its second step has NaN. Its pictures are integers, which hide that.
    (r"Cosmos2(TextToImage|VideoToWorld)", {"scheduler": partial(diffusers.FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True)}),
    (r"Cosmos2", {"CosmosTransformer3DModel": {"extra_pos_embed_type": None}}),
    (r"^Sana(PAG|ControlNet)?Pipeline", _FLOW),
    (r"SanaSprint", {"scheduler": diffusers.SCMScheduler, "SanaTransformer2DModel": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}}),
    (r"^(Wan(ImageToVideo|VACE)?|LucyEdit)Pipeline", {"boundary_ratio": lambda: 0.9}),
    (r"LucyEdit", {"WanTransformer3DModel": {"in_channels": 32}}),
    (r"WanImageToVideo|SkyReelsV2(DiffusionForcing)?ImageToVideo", {"WanTransformer3DModel": {"in_channels": 36}}),
    (r"SkyReelsV2ImageToVideo", {"SkyReelsV2Transformer3DModel": {"in_channels": 36, "image_dim": TEXT}}),
    (r"CogVideoXImageToVideo|CogVideoXFunControl", {"CogVideoXTransformer3DModel": {"in_channels": 8}}),
    (r"Cosmos2?VideoToWorld", {"CosmosTransformer3DModel": {"in_channels": 17}}),
    (r"CogView4Control", {"CogView4Transformer2DModel": {"in_channels": 8}}),
    (r"StableCascadeDecoder", {"StableCascadeUNet": {
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "effnet_in_channels": 16, "conditioning_dim": 16,
        "timestep_conditioning_type": ("sca",), "self_attn": True}}),
    (r"StableCascadePrior", {"StableCascadeUNet": {"clip_image_in_channels": TEXT, "clip_text_in_channels": TEXT}}),
    (r"^KandinskyV22(Img2Img)?(Combined)?Pipeline", {"UNet2DConditionModel": {
        "addition_embed_type": "image", "encoder_hid_dim": TEXT, "encoder_hid_dim_type": "image_proj", "out_channels": 8}}),
    (r"^KandinskyV22Inpaint(Combined)?Pipeline", {"UNet2DConditionModel": {
        "addition_embed_type": "image", "encoder_hid_dim": TEXT, "encoder_hid_dim_type": "image_proj", "in_channels": 9, "out_channels": 8}}),
    (r"^KandinskyV22Controlnet", {"UNet2DConditionModel": {
        "addition_embed_type": "image_hint", "encoder_hid_dim": TEXT, "encoder_hid_dim_type": "image_proj", "in_channels": 8, "out_channels": 8}}),
    (r"^IF", {"UNet2DConditionModel": {
        "in_channels": 3, "out_channels": 6, "encoder_hid_dim": TEXT, "encoder_hid_dim_type": "text_proj"}}),
    (r"^IF.*SuperResolution", {"UNet2DConditionModel": {
        "in_channels": 6, "out_channels": 6, "encoder_hid_dim": TEXT, "encoder_hid_dim_type": "text_proj", "class_embed_type": "timestep"}}),
    (r"HunyuanDiTControlNet", {"HunyuanDiT2DModel": {"num_layers": 4}, "HunyuanDiT2DControlNetModel": {"transformer_num_layers": 4}}),
    (r"HunyuanVideo15ImageToVideo", {"HunyuanVideo15Transformer3DModel": {"task_type": "i2v"}}),
    (r"^(StableDiffusion3|SD3)", {"T5EncoderModel": {"d_model": 2 * TEXT}}),
    (r"HunyuanVideoImageToVideo", {"HunyuanVideoTransformer3DModel": {"image_condition_type": "token_replace"}}),
    (r"HunyuanSkyreels", {"HunyuanVideoTransformer3DModel": {"in_channels": 8}}),
    (r"LongCatImage", {"AutoencoderKL": {"latent_channels": 16}, "LongCatImageTransformer2DModel": {"in_channels": 64}}),
    (r"LongCatImageEdit", {"text_processor": lambda: Processor()}),
    (r"GlmImage", {
        "processor": lambda: Processor(), "vision_language_encoder": lambda: Passing(), "AutoencoderKL": {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        "transformer": lambda: _random(diffusers.GlmImageTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=TEXT,
            time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=32))}),
    (r"BriaFibo", {"SmolLM3ForCausalLM": {"hidden_size": TEXT // 2, "vocab_size": 128256}}),
    (r"ChromaInpaint", {"transformer": lambda: _with_config("ChromaTransformer2DModel", guidance_embeds=False)}),
    (r"EasyAnimateInpaint", {"EasyAnimateTransformer3DModel": {"in_channels": 9, "resize_inpaint_mask_directly": True}}),
    (r"OmniGen|Kandinsky5I2I", {"AutoencoderKL": _VAE_8}),
    (r"QwenImageControlNetInpaint", {"QwenImageControlNetModel": {"extra_condition_channels": 4}}),
    (r"VisualCloze", {"resolution": lambda: PIXELS}),
    (r"Kandinsky5I2I", {"Kandinsky5Transformer3DModel": {"in_visual_dim": 4, "out_visual_dim": 4, "visual_cond": True}}),
    (r"Kandinsky5I2V", {"Kandinsky5Transformer3DModel": {"visual_cond": True}}),
    (r"HeliosPipeline", {"scheduler": partial(diffusers.HeliosScheduler, stages=1)}),
    # With the default, a third, the covariance that it factorizes is singular.
    (r"HeliosPyramid", {"scheduler": partial(diffusers.HeliosScheduler, gamma=0.3)}),
    (r"QwenImageLayered", {
        "text_encoder": lambda: Passing(),
        "QwenImageTransformer2DModel": {"use_additional_t_cond": True, "use_layer3d_rope": True}}),
    (r"SkyReelsV2ImageToVideo|WanAnimate", {"image_processor": lambda: transformers.CLIPImageProcessor(**_SIZE)}),
    (r"WanAnimate", {"WanAnimateTransformer3DModel": {
        "image_dim": TEXT, "added_kv_proj_dim": 24, "motion_encoder_size": PIXELS, "motion_style_dim": 8, "motion_dim": 4,
        "motion_encoder_dim": 8, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}}),
    (r"StableCascadeCombined", {
        "prior_prior": lambda: _made("StableCascadeUNet", clip_image_in_channels=TEXT, clip_text_in_channels=TEXT),
        "StableCascadeUNet": {
            "in_channels": 4, "out_channels": 4, "patch_size": 2, "effnet_in_channels": 16, "timestep_conditioning_type": ("sca",),
            "self_attn": True}}),
    (r"UVit|Amused", {"VQModel": {"latent_channels": 8, "vq_embed_dim": 8, "num_vq_embeddings": 16, "lookup_from_codebook": True}}),
    # Prompts modulated by the timestep (LTX 2.3), and marked keyframes (LTX 2.5).
    (r"LTX2(Condition|InContext|DFR)", {
        "LTX2VideoTransformer3DModel": {
            "cross_attn_mod": True, "audio_cross_attn_mod": True, "gated_attn": True, "audio_gated_attn": True, "perturbed_attn": True,
            "use_prompt_embeddings": False},
        "LTX2TextConnectors": {
            "per_modality_projections": True, "video_hidden_dim": 16, "audio_hidden_dim": 8, "audio_connector_attention_head_dim": 4,
            "video_gated_attn": True, "audio_gated_attn": True}}),
    (r"LTX2DFRTemporal", {"LTX2LatentUpsamplerModel": {"spatial_upsample": False, "temporal_upsample": True}}),
    (r"LTX2DFR", {"LTX2VideoTransformer3DModel": {"use_keyframes_abs_pos_embedding": True, "use_prompt_adaln_single": False}}),
    (r"Ideogram4", {"text_encoder": lambda: _qwen_vl(36)}),
    (r"MotifVideo", {"guider": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0), **_FLOW}),
    (r"QwenImage21", {"processor": lambda: Chats()}),
    (r"HunyuanImageRefiner", {"HunyuanImageTransformer2DModel": {
        "in_channels": 16, "out_channels": 8, "patch_size": (1, 1, 1), "rope_axes_dim": (2, 2, 4), "text_embed_2_dim": None, "guidance_embeds": True}}),
    (r"ZImageControlNetInpaint", {"ZImageControlNetModel": {"control_in_dim": 9}}),
    (r"DreamLite", {"text_encoder": lambda: _qwen_vl(1), **_FLOW}),
    (r"Cosmos2_5", {
        "CosmosTransformer3DModel": {"in_channels": 17, "controlnet_block_every_n": 1},
        "scheduler": partial(diffusers.UniPCMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction", use_karras_sigmas=True)}),
    (r"AceStep", {"text_encoder": lambda: _text_model(transformers.Qwen3Model, {})}),
    (r"^(AudioLDM|MusicLDM)Pipeline", {"UNet2DConditionModel": {
        "cross_attention_dim": (8, 16), "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": TEXT,
        "class_embeddings_concat": True}}),
    (r"^UnCLIP", {
        "UNet2DConditionModel": {
            "in_channels": 3, "out_channels": 6, "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift", "class_embed_type": "identity"},
        "UNet2DModel": {
            "sample_size": 16, "in_channels": 6, "out_channels": 3, "down_block_types": ("ResnetDownsampleBlock2D",),
            "up_block_types": ("ResnetUpsampleBlock2D",)},
        "prior_scheduler": partial(diffusers.UnCLIPScheduler, prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": partial(diffusers.UnCLIPScheduler, variance_type="learned_range")}),
    (r"^StableUnCLIP", {"UNet2DConditionModel": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * TEXT}}),
    (r"VQDiffusion", {"scheduler": lambda: diffusers.VQDiffusionScheduler(num_vec_classes=17)}),
    (r"AudioLDM|MusicLDM", {"AutoencoderKL": {"in_channels": 1, "out_channels": 1}}),
    (r"PaintByExample", {"UNet2DConditionModel": {"in_channels": 9}}),
)  # fmt: skip

# What is done with a pipeline before it is called, by a pattern of its name.
READY: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    # It divides by 1 - b, which is near zero here and there with random weights.
    (r"WuerstchenCombined", lambda pipe: pipe.prior_prior.out[-1].bias.data[16:].sub_(4)),
    (r"LEditsPP", lambda pipe: pipe.invert(image=picture(), num_inversion_steps=2, skip=0.0, height=32, width=32)),
)  # fmt: skip
# What a pipeline fixes itself, by a pattern of its name: attributes of the pipeline, or names in its module.
OWN: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"^QwenImageEdit(Inpaint)?Pipeline", {"calculate_dimensions": lambda _area, _ratio: (PIXELS, PIXELS, None)}),
    (r"QwenImage(EditPlus|Layered)|LongCatImageEdit", {"calculate_dimensions": lambda _area, _ratio: (PIXELS, PIXELS)}),
    (r"Kandinsky5I2I", {"resolutions": [(PIXELS, PIXELS)]}),
    (r"LongCatImage", {"_encode_prompt": lambda *_: text()}),
    (r"KolorsImg2Img", {"encode_prompt": lambda **_: (text(), text(), text(1, TEXT), text(1, TEXT))}),  # its own loses embeddings
)  # fmt: skip

_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


def picture(size: int = PIXELS) -> PIL.Image.Image:
    values = np.random.RandomState(0).randint(0, 255, (size, size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def _clip(size: int = PIXELS) -> list[PIL.Image.Image]:
    return [picture(size)] * 5


def text(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (1, LENGTH, TEXT)), generator=torch.Generator().manual_seed(1))


# What a call gives by the name of the argument; only what the pipeline takes is given.
ARGUMENTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: "a red cat",
    "height": lambda: PIXELS,
    "width": lambda: PIXELS,
    "num_frames": lambda: 5,
    "video_length": lambda: 5,
    "max_sequence_length": lambda: LENGTH,
    "mask_image": lambda: picture().convert("L"),
    "control_image": picture,
    "conditioning_image": picture,
    "video": _clip,
    "clean_caption": lambda: False,
    "use_resolution_binning": lambda: False,
    "complex_human_instruction": lambda: None,
    "image_embeds": lambda: text(1, TEXT),
    "negative_image_embeds": lambda: text(1, TEXT),
    "class_labels": lambda: [1],
    "source_prompt": lambda: "a blue cat",
    "decode_chunk_size": lambda: 2,
    "strength": lambda: 0.9,
    "control_mask": lambda: picture().convert("L"),
}


def needs_picture(parameter: inspect.Parameter) -> bool:
    """Return True for an argument that is a picture and has to be given: it has no default, or a pipeline of pictures."""
    return parameter.name in ("image", "example_image", "reference_image")


_MASK = {"prompt_embeds_mask": torch.ones(1, LENGTH, dtype=torch.long), "negative_prompt_embeds_mask": torch.ones(1, LENGTH, dtype=torch.long)}  # fmt: skip
_PAIR = dict.fromkeys(_EMBEDS, text)
# By a pattern of the pipeline's name: other arguments of its call. A pipeline whose text encoder is not made gets
# embeddings for a prompt.
CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"QwenImage|NucleusMoE", {"prompt": None, **_PAIR, **_MASK}),
    (r"ZImage", {"prompt": None, "prompt_embeds": lambda: [text(LENGTH, TEXT)], "negative_prompt_embeds": lambda: [text(LENGTH, TEXT)]}),
    (r"Flux2|Klein", {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": text}),
    (r"HunyuanImage|HunyuanVideo15", {
        "prompt": None, **_PAIR, **_MASK, "prompt_embeds_2": text, "negative_prompt_embeds_2": text,
        "prompt_embeds_mask_2": lambda: torch.ones(1, LENGTH, dtype=torch.long),
        "negative_prompt_embeds_mask_2": lambda: torch.ones(1, LENGTH, dtype=torch.long)}),
    (r"Kandinsky5", {
        "prompt": None, "prompt_embeds_qwen": text, "prompt_embeds_clip": lambda: text(1, TEXT), "negative_prompt_embeds_qwen": text,
        "negative_prompt_embeds_clip": lambda: text(1, TEXT), "prompt_cu_seqlens": lambda: torch.tensor([0, LENGTH], dtype=torch.int32),
        "negative_prompt_cu_seqlens": lambda: torch.tensor([0, LENGTH], dtype=torch.int32)}),
    (r"HiDream", {
        "prompt": None, "prompt_embeds_t5": text, "prompt_embeds_llama3": lambda: text(2, 1, LENGTH, TEXT),
        "negative_prompt_embeds_t5": text, "negative_prompt_embeds_llama3": lambda: text(2, 1, LENGTH, TEXT),
        "pooled_prompt_embeds": lambda: text(1, 2 * TEXT), "negative_pooled_prompt_embeds": lambda: text(1, 2 * TEXT)}),
    (r"HunyuanVideo(Pipeline|Framepack|ImageTo)|HunyuanSkyreels", {
        "prompt": None, "prompt_embeds": text, "pooled_prompt_embeds": lambda: text(1, TEXT),
        "prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long), "negative_prompt_embeds": text,
        "negative_pooled_prompt_embeds": lambda: text(1, TEXT), "negative_prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long)}),
    (r"Cosmos2_5|Ovis", {"prompt": None, **_PAIR}),
    (r"LongCatImage", {"enable_prompt_rewrite": False}),
    (r"GlmImage", {"prompt": None, **_PAIR, "prior_token_ids": lambda: torch.arange(16)[None]}),
    (r"EasyAnimate", {
        "prompt": None, **_PAIR, "prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long),
        "negative_prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long)}),
    (r"HunyuanDiT", {
        "prompt": None, **_PAIR, "prompt_embeds_2": text, "negative_prompt_embeds_2": text,
        **{n: (lambda: torch.ones(1, LENGTH, dtype=torch.long)) for n in (
            "prompt_attention_mask", "negative_prompt_attention_mask", "prompt_attention_mask_2", "negative_prompt_attention_mask_2")}}),
    (r"SkyReels|Helios|LucyEdit|WanImageTo|ChronoEdit|WanVACE|WanVideo|PRXPixel|Ovis", {"prompt": None, "negative_prompt": None, **_PAIR}),
    (r"Marigold", {"processing_resolution": PIXELS}),
    (r"Allegro|PRX", {"output_type": "latent"}),
    (r"Kontext", {"_auto_resize": False, "max_area": PIXELS**2}),
    (r"SkyReelsV2DiffusionForcing", {"base_num_frames": 5, "ar_step": 0, "num_frames": 5, "overlap_history": None}),
    (r"SkyReelsV2DiffusionForcingVideoToVideo", {"overlap_history": 1, "base_num_frames": 9, "num_frames": 9}),
    (r"Kandinsky5I2V", {"num_frames": 17}),  # it takes the statistics of the frames after the fourth
    (r"Helios", {"video": None}),
    (r"HeliosPyramid", {"height": 64, "width": 64, "pyramid_num_inference_steps_list": [1, 1, 2]}),  # its first stage has a quarter of the height
    (r"Cosmos(2?VideoToWorld|2_5_Predict)", {"num_frames": 9}),  # the five of its video are not denoised
    (r"BriaFibo", {"height": 32, "width": 32}),
    (r"BriaFiboEdit", {"prompt": '{"edit_instruction": "a red cat"}'}),
    (r"EasyAnimateInpaint", {"video": lambda: text(1, 3, 5, PIXELS, PIXELS)}),
    (r"OmniGen", {"height": 32, "width": 32}),
    (r"PRXPipeline", {
        "prompt": None, **_PAIR, "prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.bool),
        "negative_prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.bool)}),
    (r"QwenImageLayered", {"prompt": "a red cat", "image": picture, "layers": 2}),
    (r"VisualCloze", {
        "task_prompt": "a red cat", "content_prompt": "a dog", "image": lambda: [[picture(), picture()], [picture(), None]],
        "upsampling_strength": 0}),  # the upsampling calls the same network with other sizes
    (r"WanAnimate", {
        "prompt": None, "prompt_embeds": lambda: text(1, 512, TEXT),  # what is left of 512 tokens is the picture's
        "image": picture, "pose_video": _clip, "face_video": _clip, "segment_frame_length": 5}),
    (r"ZImageOmni", {"prompt_embeds": lambda: [[text(LENGTH, TEXT)]], "negative_prompt_embeds": lambda: [[text(LENGTH, TEXT)]]}),
    (r"CogVideoXFunControl", {"control_video": _clip}),
    (r"StableAudioPipeline", {"audio_end_in_s": 1.0}),
    (r"DanceDiffusion", {"audio_length_in_s": 1.0}),
    (r"ControlNet(Inpaint|PAGInpaint|Union)?", {"control_image": picture}),
    (r"StableVideoDiffusion", {"decode_chunk_size": 2}),
    (r"StableCascadeDecoder", {"image_embeddings": lambda: text(1, 16, 3, 3)}),
    (r"StableCascade(Prior|Combined)|WuerstchenCombined", {"height": 3 * 42, "width": 3 * 42}),
    (r"StableDiffusionAdapter|StableDiffusionXLAdapter", {"image": picture}),
    (r"UnionPipeline", {"control_image": lambda: [picture()], "control_mode": lambda: [0]}),
    (r"Union", {"control_mode": lambda: [0], "control_image": lambda: [picture()]}),
    (r"KandinskyV22Controlnet", {"hint": lambda: text(1, 3, 4 * PIXELS, 4 * PIXELS)}),  # the network makes an eighth of it
    (r"Kolors", {
        "prompt": None, **_PAIR, "pooled_prompt_embeds": lambda: text(1, TEXT), "negative_pooled_prompt_embeds": lambda: text(1, TEXT)}),
    (r"SuperResolution", {"original_image": picture}),
    (r"LDMSuperResolution|RePaint", {"image": lambda: picture(32), "mask_image": lambda: picture(32)}),
    (r"AttendAndExcite", {"token_indices": lambda: [[1]], "attn_res": (4, 4)}),
    (r"GLIGEN", {"gligen_phrases": lambda: ["a cat"], "gligen_boxes": lambda: [[0.1, 0.1, 0.6, 0.6]], "gligen_images": lambda: [picture()]}),
    (r"TextToVideoZero", {"t0": 0, "t1": 1}),
    (r"WuerstchenDecoder", {"image_embeddings": lambda: text(1, 16, 3, 3)}),
    (r"DiffEdit", {
        "mask_image": lambda: (text(1, 1, 8, 8) > 0).float(), "image_latents": lambda: text(1, 2, 4, 8, 8), "inpaint_strength": 1.0}),
    (r"LEditsPP", {"editing_prompt": lambda: ["a dog"], "prompt": None, "use_intersect_mask": False}),  # of attention maps
    (r"I2VGenXL", {"target_fps": 8, "clip_skip": None}),
    (r"AnimateDiffSparse", {"conditioning_frames": lambda: _clip()[:1], "controlnet_frame_indices": (0,)}),
    (r"AnimateDiff(VideoToVideo)?ControlNet", {"conditioning_frames": _clip}),
    (r"Mochi", {"num_frames": 7}),
    (r"CycleDiffusion", {"eta": 0.1}),  # it divides by eta
    (r"LTX2", {
        "prompt": None, "prompt_embeds": lambda: text(1, LENGTH, 2 * TEXT), "negative_prompt_embeds": lambda: text(1, LENGTH, 2 * TEXT),
        "prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long), "spatio_temporal_guidance_blocks": lambda: [1],
        "negative_prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long), "image_crf": 0, "decode_timestep": 0.0}),
    (r"LTX2Condition", {"conditions": lambda: LTX2VideoCondition(picture(32), crf=0)}),
    (r"LTX2InContext", {
        "reference_conditions": lambda: LTX2ReferenceCondition(_clip(32)), "conditioning_attention_strength": 0.5}),
    (r"LTX2HDR", {"reference_conditions": lambda: LTX2HDRReferenceCondition(_clip(32))}),
    (r"LTX2DFR", {"sigmas": lambda: [1.0, 0.5]}),
    (r"LTX2DFRTemporal", {
        "latents": lambda: text(1, 4, 3, 8, 8), "keyframes_latents": lambda: text(1, 4, 1, 8, 8), "keyframe_positions": (4,),
        "audio_latents": lambda: text(1, 2, 6, 4), "num_frames": 5}),
    (r"Krea2", {
        "prompt": None, "prompt_embeds": lambda: text(1, LENGTH, 2, TEXT), "negative_prompt_embeds": lambda: text(1, LENGTH, 2, TEXT),
        "prompt_embeds_mask": lambda: torch.arange(LENGTH)[None] < 6, "negative_prompt_embeds_mask": lambda: torch.arange(LENGTH)[None] < 4}),
    (r"ErnieImage", {
        "prompt": None, "prompt_embeds": lambda: [text(LENGTH, TEXT)], "negative_prompt_embeds": lambda: [text(LENGTH - 2, TEXT)]}),
    (r"BriaFibo2", {
        "prompt": None, "prompt_embeds": lambda: text(1, 2, LENGTH, TEXT), "negative_prompt_embeds": lambda: text(1, 2, LENGTH, TEXT)}),
    (r"AnyFlow", {"prompt": None, **_PAIR, "video": None, "guidance_scale": 4.0}),
    (r"MotifVideo", {"prompt": None, **_PAIR, **{n: (lambda: torch.ones(1, LENGTH, dtype=torch.bool)) for n in (
        "prompt_attention_mask", "negative_prompt_attention_mask")}}),
    (r"JoyImage", {"prompt": None, **_PAIR, **_MASK, "image": None}),
    (r"QwenImage21", {"output_resolution": PIXELS, "true_cfg_scale": 4.0}),
    (r"StableAudio3", {
        "prompt": None, "prompt_embeds": text, "negative_prompt_embeds": text, "duration": 1.0,
        "encoder_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long), "guidance_scale": 2.0,
        "negative_encoder_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long)}),
    (r"StableAudio3(Audio|Inpaint)", {"audio": lambda: text(1, 2, 64)}),
    (r"LongCatAudio", {"audio_duration_s": 1.0}),
    (r"HunyuanImageRefiner", {"image": picture}),
    (r"Cosmos2_5_Transfer", {"controls": _clip, "prompt": None, **_PAIR, "num_frames_per_chunk": 5}),
    (r"StableAudio3Inpaint", {"mask_start_seconds": 0.25, "mask_end_seconds": 0.5}),
    (r"Ideogram4", {"guidance_schedule": None, "guidance_scale": 4.0, "max_sequence_length": 32}),
    (r"Cosmos2_5", {"num_latent_conditional_frames": 1}),
    (r"AceStep", {"audio_duration": 0.5, "lyrics": "a red cat", "guidance_scale": 4.0}),
    (r"Kandinsky6TI2VA", {
        "prompt": None, **_PAIR, "pooled_prompt_embeds": lambda: text(1, TEXT), "negative_pooled_prompt_embeds": lambda: text(1, TEXT)}),
    (r"SanaWM", {
        "image": lambda: picture(32), **_PAIR, "prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long),
        "negative_prompt_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long), "intrinsics": (16.0, 16.0, 16.0, 16.0),
        "c2w": lambda: np.stack([np.eye(4)] * 5)}),
    (r"^(AudioLDM|MusicLDM)", {
        "prompt": None, "prompt_embeds": lambda: text(1, TEXT), "negative_prompt_embeds": lambda: text(1, TEXT), "audio_length_in_s": 0.5}),
    (r"^AudioLDM2", {
        **_PAIR, "generated_prompt_embeds": text, "negative_generated_prompt_embeds": text,
        "attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long), "negative_attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.long)}),
    (r"^UnCLIP", {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}),
    (r"^(Sana|LTX|HunyuanVideo15)", {"height": 32, "width": 32}),
)  # fmt: skip


def classes_of(annotation: Any) -> list[Any]:
    """Return the classes that an annotation allows, in order."""
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return [c for a in typing.get_args(annotation) for c in classes_of(a)]
    if isinstance(annotation, str):  # of a class that is imported for type checkers alone
        annotation = getattr(diffusers, annotation, None)
    return [annotation] if isinstance(annotation, type) else []


def _named(table: tuple[tuple[str, dict[str, Any]], ...], pipeline: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern, values in table:
        for key, value in values.items() if re.search(pattern, pipeline) else ():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    return found


def _random(network: nn.Module) -> nn.Module:
    """Randomize the parameters that start at zero or uninitialized, because they would hide the layers before them."""
    for parameter in network.parameters():
        if parameter.is_floating_point() and not 1e-6 < float(parameter.abs().max()) < 1e3:
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def _eval(module: nn.Module) -> nn.Module:
    return module.eval()


def _text_model(cls: Any, more: Mapping[str, Any]) -> nn.Module:
    """Make a language model by the fields that its config has."""
    fields = {
        **_LLM,
        "vocab_size": 64,
        "query_pre_attn_scalar": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "type_vocab_size": 2,
        **more,
    }
    return _eval(cls(cls.config_class(**fields)))


def _t5(cls: Any, more: Mapping[str, Any]) -> nn.Module:
    fields = {
        "vocab_size": 64,
        "d_model": TEXT,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        **more,
    }
    return _eval(cls(cls.config_class(**fields)))


def _vision(cls: Any, more: Mapping[str, Any]) -> nn.Module:
    fields = {**_TRANSFORMER_XL, **_EYE, **more}
    return _eval(cls(cls.config_class(**fields)))


def _tokenizer() -> Any:
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def _qwen_vl(layers: int) -> nn.Module:
    """Make a vision and language model with so many layers: some pipelines read the outputs of certain ones."""
    rope = {
        "rope_type": "default",
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "rope_theta": 10000.0,
    }
    return _eval(transformers.Qwen3VLModel(transformers.Qwen3VLConfig(
        text_config={**_LLM, "num_hidden_layers": layers, "vocab_size": 64, "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": TEXT, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT,
            "deepstack_visual_indexes": [0]},
    )))  # fmt: skip


class Passing(nn.Module):
    """A safety checker that lets everything pass."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


class Processor:
    """A processor of pictures for a language model that is not asked."""

    image_processor = None


_EYE = {"image_size": PIXELS, "patch_size": 8, "projection_dim": TEXT}


class Chats:
    """A processor of which a pipeline asks only how many tokens its own message has."""

    def __init__(self) -> None:
        self.tokenizer = _tokenizer()

    def apply_chat_template(self, *_messages: Any, **_more: Any) -> list[list[int]]:
        return [[0, 1]]


_BASES = {"Gemma2PreTrainedModel": "Gemma2Model", "GemmaPreTrainedModel": "GemmaModel"}


def _made(title: str, **more: Any) -> nn.Module:
    return _random(getattr(diffusers, title)(**{**COMPONENTS[title], **more}))


def _with_config(title: str, **fields: Any) -> nn.Module:
    """Make a network whose published config has fields that its class does not take."""
    network = _made(title)
    network.register_to_config(**fields)  # type: ignore[operator]
    return network


def component(cls: Any, pipeline: str, name: str, folder: Path) -> Any:
    """Return a tiny component of class `cls` for the pipeline's argument `name`. Raises KeyError if none is known."""
    title, more = cls.__name__, _named(OF_PIPELINE, pipeline).get(cls.__name__, {})
    if issubclass(cls, enum.Enum):
        return diffusers.DDIMScheduler()
    if issubclass(cls, diffusers.SchedulerMixin):
        return cls()
    if title.endswith("Guidance"):
        return cls()
    if title.endswith(("ImageProcessor", "FeatureExtractor")):
        return cls(**_SIZE) if "CLIP" in title or "Siglip" in title else cls()
    if title.startswith("CLIPTextModel"):
        return clip_encoder(cls, len(clip_tokenizer(folder / "encoder")), TEXT)
    if title == "CLIPTokenizer":
        return clip_tokenizer(folder / name)
    if issubclass(cls, transformers.PreTrainedTokenizerBase) or "Tokenizer" in title:
        return _tokenizer()
    if title.endswith("T5EncoderModel"):
        return _t5(cls, more)
    if "Vision" in title and issubclass(cls, transformers.PreTrainedModel):
        return _vision(cls, more)
    if title in (
        "BertModel",
        "LlamaModel",
        "GlmModel",
        "Gemma2PreTrainedModel",
        "GemmaPreTrainedModel",
        "Qwen3Model",
        "SmolLM3ForCausalLM",
    ):
        return _text_model(getattr(transformers, _BASES.get(title, title)), more)
    if title == "MultilingualCLIP":
        return _text_model(cls, {"transformerDimSize": TEXT, "imageDimSize": TEXT})
    if title == "RobertaSeriesModelWithTransformation":
        return _text_model(cls, {"project_dim": TEXT, "pad_token_id": 1})
    if title == "PaintByExampleImageEncoder":
        return _eval(cls(transformers.CLIPVisionConfig(**{**_TRANSFORMER_XL, **_EYE}), proj_size=TEXT))
    if issubclass(cls, transformers.PreTrainedModel) and title in COMPONENTS:
        return _eval(cls(cls.config_class(**{**COMPONENTS[title], **more})))
    if issubclass(cls, diffusers.ModelMixin):
        return _random(cls(**{**COMPONENTS[title], **more}))
    if title in COMPONENTS:
        return cls(**{**COMPONENTS[title], **more})
    raise KeyError(title)


def make(pipeline: type, folder: Path) -> Any:
    """Return a tiny instance of a pipeline class. Components of unknown classes are None where a text prompt can be embeddings."""
    given: dict[str, Any] = {}
    own = _named(OF_PIPELINE, pipeline.__name__)
    try:
        signature = inspect.signature(pipeline.__init__, eval_str=True)  # type: ignore[misc]
    except NameError:  # names that are imported for type checkers alone
        signature = inspect.signature(pipeline.__init__)  # type: ignore[misc]
    for name, parameter in signature.parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        allowed = classes_of(parameter.annotation)
        if name in own:
            given[name] = own[name]()
            continue
        wanted = name in OPTIONAL_BUT_MADE and allowed
        if parameter.default is not parameter.empty and not wanted:
            if name == "requires_safety_checker":
                given[name] = False
            continue
        given[name] = _first(allowed, pipeline.__name__, name, folder)
    made = pipeline(**given)
    made.set_progress_bar_config(disable=True)
    for module in made.components.values():
        if isinstance(module, nn.Module):
            module.eval()  # a UNet that the pipeline itself makes of two is in train mode
    for name, value in _named(OWN, pipeline.__name__).items():
        setattr(made if hasattr(made, name) else sys.modules[pipeline.__module__], name, value)
    for pattern, prepare in READY:
        if re.search(pattern, pipeline.__name__):
            prepare(made)
    return made


OPTIONAL_BUT_MADE = (
    "audio_vae",
    "vocoder",
    "transformer",
    "transformer_2",
    "motion_adapter",
    "safety_checker",
)
OPTIONAL = re.compile(
    r"safety_checker|feature_extractor|text_encoder|tokenizer|processor|image_encoder|watermarker|guider"
)


def _first(allowed: list[Any], pipeline: str, name: str, folder: Path) -> Any:
    """Return the first of the allowed components that can be made."""
    reasons = []
    for cls in allowed:
        try:
            return component(cls, pipeline, name, folder)
        except KeyError as error:
            reasons.append(error.args[0])
    if OPTIONAL.search(name):
        return None
    raise LookupError(f"no tiny {' or '.join(map(str, reasons)) or 'component'} is known for {name}")


def arguments(pipe: Any) -> dict[str, Any]:
    """Return the arguments of a short call that draws one sample."""
    name, takes = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    given = {n: make_() for n, make_ in ARGUMENTS.items() if n in takes}
    for n, parameter in takes.items():
        if needs_picture(parameter) and (parameter.default is parameter.empty or re.search(
            "Img2Img|ImageToVideo|Inpaint|Edit|Control|Upscale|Pix2Pix|Variation|Adapter|I2V|SuperRes|Kontext|VideoDiffusion|Fill|Cycle|I2I|Depth2Img|Example", name)):  # fmt: skip
            given[n] = picture()
    for n, value in _named(CALLS, name).items():
        if n in takes:
            given[n] = value() if callable(value) else value
    if "image" in given and takes.get("image_embeds", takes["image"]).default is None:
        given.pop("image_embeds", None)
    return given


def with_other_negatives(given: dict[str, Any], length: int) -> dict[str, Any]:
    """Return a call's arguments whose negative prompt is not the prompt, of as many tokens."""
    return {n: _other(x, length) if n.startswith("negative") else x for n, x in given.items()}


def _other(value: Any, length: int) -> Any:
    if isinstance(value, list):
        return [_other(x, length) for x in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.tolist() == [0, LENGTH]:  # where each prompt begins and ends
        return torch.tensor([0, length], dtype=value.dtype)
    for dim in (i for i, size in enumerate(value.shape) if size == LENGTH):
        value = value.narrow(dim, 0, length)
    return -value if value.is_floating_point() else value
