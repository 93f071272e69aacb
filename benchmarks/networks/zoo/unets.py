"""U-Nets of images without text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel

from benchmarks.networks.zoo.entry import TIME, Entry, builder, noise, resnets, steps

_DDPM: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
_DDPM_CIFAR = {
    **_DDPM,
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
_DDPM_LSUN = {
    **_DDPM,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
# openai's consistency model of LSUN cats, an unconditional ADM: its down- and upsamplers are residual blocks
# and so have time projections of their own.
_ADM_CAT = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 3,
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "positional",
}
_NCSNPP = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 3,
    "attention_head_dim": None,
    "block_out_channels": (128, 128, 256, 256, 256, 256, 256),
    "down_block_types": ("SkipDownBlock2D",) * 4 + ("AttnSkipDownBlock2D",) + ("SkipDownBlock2D",) * 2,
    "up_block_types": ("SkipUpBlock2D",) * 2 + ("AttnSkipUpBlock2D",) + ("SkipUpBlock2D",) * 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": math.sqrt(2),
    "norm_eps": 1e-6,
    "norm_num_groups": None,
    "time_embedding_type": "fourier",
}
_CIFAR_FEATURES = resnets(down=(2, 2, 2), up=(3, 3, 3))
_LSUN_FEATURES = resnets(down=(1, 1, 1, 1), up=(2, 2, 2, 2))
_ADM_FEATURES = (
    *resnets(down=(1, 1, 1), up=(2, 2, 2)),
    *(f"down_blocks.{i}.downsamplers.0.time_emb_proj" for i in range(2)),
    *(f"up_blocks.{i}.upsamplers.0.time_emb_proj" for i in range(2)),
)
_NCSNPP_FEATURES = (
    *resnets(down=(1, 1), up=(2, 2)),
    "down_blocks.0.resnet_down.time_emb_proj",
    "up_blocks.0.resnet_up.time_emb_proj",
)


def _image(channels: int, small: int, published: int, **more: Any) -> Callable[[bool], dict[str, Any]]:
    def inputs(real: bool) -> dict[str, Any]:
        size = published if real else small
        return {"sample": noise(2, channels, size, size), "timestep": steps(), "return_dict": False} | {
            name: make() for name, make in more.items()
        }

    return inputs


UNETS_2D = (
    Entry(
        name="ddpm-cifar10",
        build=builder(
            UNet2DModel,
            _DDPM_CIFAR,
            {
                "sample_size": 16,
                "block_out_channels": (16, 24, 40),
                "norm_num_groups": 8,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            },
        ),
        inputs=_image(3, 16, 32),
        features=_CIFAR_FEATURES,
        layers=(*TIME, *_CIFAR_FEATURES),
        keys=("timestep",),
        pure_features=_CIFAR_FEATURES,
        pure_layers=(*TIME, *_CIFAR_FEATURES),
    ),
    Entry(
        name="ddpm-lsun",
        build=builder(
            UNet2DModel,
            _DDPM_LSUN,
            {
                "sample_size": 16,
                "block_out_channels": (16, 16, 24, 40),
                "norm_num_groups": 8,
                "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            },
        ),
        inputs=_image(3, 16, 256),
        features=_LSUN_FEATURES,
        layers=(*TIME, *_LSUN_FEATURES),
        keys=("timestep",),
        pure_features=_LSUN_FEATURES,
        pure_layers=(*TIME, *_LSUN_FEATURES),
    ),
    Entry(
        name="ddpm-class-conditional",
        build=builder(
            UNet2DModel,
            {**_DDPM_CIFAR, "num_class_embeds": 10},
            {
                "sample_size": 16,
                "block_out_channels": (16, 24, 40),
                "norm_num_groups": 8,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            },
        ),
        inputs=_image(3, 16, 32, class_labels=lambda: torch.tensor([3, 7])),
        features=_CIFAR_FEATURES,
        layers=(*TIME, *_CIFAR_FEATURES),
        keys=("timestep", "class_labels"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=TIME,
        bitwise_note="the labels go through an nn.Embedding, which is no weighted layer",
    ),
    Entry(
        name="adm-scale-shift",
        build=builder(
            UNet2DModel,
            _ADM_CAT,
            {
                "sample_size": 16,
                "block_out_channels": (16, 24, 40),
                "norm_num_groups": 8,
                "attn_norm_num_groups": 8,
                "attention_head_dim": 8,
                "layers_per_block": 1,
                "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            },
        ),
        inputs=_image(3, 16, 256),
        features=_ADM_FEATURES,
        layers=(*TIME, *_ADM_FEATURES),
        keys=("timestep",),
        pure_features=_ADM_FEATURES,
        pure_layers=(*TIME, *_ADM_FEATURES),
        bitwise_note="down- and upsamplers are residual blocks with time projections",
    ),
    Entry(
        name="ncsnpp-fourier",
        build=builder(
            UNet2DModel,
            _NCSNPP,
            {
                # AttnSkip blocks normalize in 32 groups, whatever the configuration says.
                "sample_size": 8,
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
                "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            },
        ),
        inputs=lambda real: {
            "sample": noise(2, 3, 256, 256) if real else noise(2, 3, 8, 8),
            "timestep": steps(0.7, 12.3),
            "return_dict": False,
        },
        features=_NCSNPP_FEATURES,
        layers=(*TIME, *_NCSNPP_FEATURES),
        keys=("timestep",),
        pure_features=_NCSNPP_FEATURES,
        pure_layers=(*TIME, *_NCSNPP_FEATURES),
        bitwise_note="float timesteps, positive; the output is divided by the timestep itself",
    ),
)
