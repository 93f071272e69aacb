"""U-Nets of video and of trajectories."""

from __future__ import annotations

import torch
from diffusers import UNet1DModel, UNet3DConditionModel, UNetSpatioTemporalConditionModel

from benchmarks.networks.zoo.entry import ADD, TIME, Entry, builder, noise, pair, resnets, steps

_3D_FEATURES = resnets(down=(1, 1), up=(2, 2))
_SVD_FEATURES = resnets(
    down=(1, 1),
    up=(2, 2),
    projections=("spatial_res_block.time_emb_proj", "temporal_res_block.time_emb_proj"),
)
_1D_FEATURES = resnets(down=(2, 2, 2), up=(2, 2), projections=("time_emb",))

UNETS_VIDEO = (
    Entry(
        name="text-to-video",
        build=builder(
            UNet3DConditionModel,
            {
                "sample_size": 32,
                "attention_head_dim": 64,
                "block_out_channels": (320, 640, 1280, 1280),
                "cross_attention_dim": 1024,
                "down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
                "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
                "layers_per_block": 2,
                "norm_num_groups": 32,
            },
            {
                "sample_size": 8,
                "attention_head_dim": 4,
                "block_out_channels": (16, 24),
                "cross_attention_dim": 20,
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
                "layers_per_block": 1,
                "norm_num_groups": 8,
            },
        ),
        inputs=lambda real: {
            "sample": noise(2, 4, 16, 32, 32) if real else noise(2, 4, 3, 8, 8),
            "timestep": steps(),
            "encoder_hidden_states": noise(2, 77, 1024) if real else noise(2, 5, 20),
            "return_dict": False,
        },
        features=_3D_FEATURES,
        layers=(*TIME, *_3D_FEATURES),
        keys=("timestep",),
        pure_features=_3D_FEATURES,
        pure_layers=(*TIME, *_3D_FEATURES),
        bitwise_note="the embedding is repeated once per frame ahead of the projections, so that the features have"
        " batch x frames rows",
    ),
    Entry(
        name="stable-video-diffusion",
        build=builder(
            UNetSpatioTemporalConditionModel,
            {
                "sample_size": 96,
                "in_channels": 8,
                "out_channels": 4,
                "addition_time_embed_dim": 256,
                "block_out_channels": (320, 640, 1280, 1280),
                "cross_attention_dim": 1024,
                "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
                "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
                "layers_per_block": 2,
                "num_attention_heads": (5, 10, 20, 20),
                "num_frames": 14,
                "projection_class_embeddings_input_dim": 768,
                "transformer_layers_per_block": 1,
            },
            {
                # Its blocks normalize in 32 groups, whatever the configuration says.
                "sample_size": 8,
                "addition_time_embed_dim": 12,
                "block_out_channels": (32, 64),
                "cross_attention_dim": 20,
                "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                "layers_per_block": 1,
                "num_attention_heads": (2, 4),
                "num_frames": 3,
                "projection_class_embeddings_input_dim": 36,
            },
        ),
        inputs=lambda real: {
            "sample": noise(2, 14, 8, 72, 128) if real else noise(2, 3, 8, 8, 8),
            "timestep": steps(-0.4, 1.6),  # a quarter of the logarithm of sigma
            "encoder_hidden_states": noise(2, 1, 1024) if real else noise(2, 1, 20),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02], [12.0, 64.0, 0.1]]),
            "return_dict": False,
        },
        features=_SVD_FEATURES,
        layers=(*TIME, *ADD, *_SVD_FEATURES),
        keys=("timestep", "added_time_ids"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=TIME,
        bitwise_note="float timesteps; time_pos_embed of the transformers embeds the frames' numbers and depends"
        " on no input at all; the embedding is repeated once per frame ahead of the projections",
    ),
    Entry(
        name="diffuser-hopper",
        build=builder(
            UNet1DModel,
            {
                "sample_size": 65536,
                "in_channels": 14,
                "out_channels": 14,
                "act_fn": "mish",
                "block_out_channels": (32, 128, 256),
                "down_block_types": ("DownResnetBlock1D",) * 3,
                "up_block_types": ("UpResnetBlock1D",) * 2,
                "mid_block_type": "MidResTemporalBlock1D",
                "out_block_type": "OutConv1DBlock",
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "time_embedding_type": "positional",
                "use_timestep_embedding": True,
            },
            {"in_channels": 5, "out_channels": 5, "block_out_channels": (16, 24, 40)},
        ),
        inputs=lambda real: {
            "sample": noise(2, 14, 32) if real else noise(2, 5, 16),
            "timestep": steps(2, 17),
            "return_dict": False,
        },
        features=_1D_FEATURES,
        layers=(*pair("time_mlp"), *_1D_FEATURES),
        keys=("timestep",),
        pure_features=_1D_FEATURES,
        pure_layers=(*pair("time_mlp"), *_1D_FEATURES),
        bitwise_note="Conv1d network; 20 denoising steps",
    ),
)
