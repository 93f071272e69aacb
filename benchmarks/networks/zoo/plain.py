"""The networks in plain torch, and the truth about them."""

from __future__ import annotations

import torch

from benchmarks.networks.zoo.ddim import DDIMModel
from benchmarks.networks.zoo.entry import Entry, builder, noise, steps
from benchmarks.networks.zoo.latent_diffusion import LDMUNetModel
from benchmarks.networks.zoo.scalar_step import ScalarStepNetwork

_DDIM_FEATURES = (
    *(f"down.{i}.block.{j}.temb_proj" for i in range(3) for j in range(1)),
    "mid.block_1.temb_proj",
    "mid.block_2.temb_proj",
    *(f"up.{i}.block.{j}.temb_proj" for i in range(3) for j in range(2)),
)
_DDIM_LAYERS = ("temb.dense.0", "temb.dense.1", *_DDIM_FEATURES)
_LDM_FEATURES = (
    # Block 0 is the first convolution, blocks 2 and 4 are the downsamplers.
    *(f"input_blocks.{i}.0.emb_layers.1" for i in (1, 3, 5)),
    *(f"middle_block.{i}.emb_layers.1" for i in (0, 2)),
    *(f"output_blocks.{i}.0.emb_layers.1" for i in range(6)),
)
_LDM_LAYERS = ("time_embed.0", "time_embed.2", *_LDM_FEATURES)
_SCALAR_FEATURES = tuple(f"blocks.{i}.film" for i in range(3))
_SCALAR_LAYERS = ("embed_in", "embed_out", *_SCALAR_FEATURES)

PLAIN = (
    Entry(
        name="ddim-official",
        build=builder(
            DDIMModel,
            {
                "ch": 128,
                "ch_mult": (1, 2, 2, 2),
                "num_res_blocks": 2,
                "attn_level": 1,
                "channels": 3,
                "groups": 32,
            },
            {"ch": 16, "ch_mult": (1, 2, 3), "num_res_blocks": 1, "groups": 8},
        ),
        inputs=lambda real: {"x": noise(2, 3, 32, 32) if real else noise(2, 3, 8, 8), "t": steps()},
        timestep="t",
        features=_DDIM_FEATURES,
        layers=_DDIM_LAYERS,
        keys=("t",),
        pure_features=_DDIM_FEATURES,
        pure_layers=_DDIM_LAYERS,
    ),
    Entry(
        name="latent-diffusion",
        build=builder(
            LDMUNetModel,
            {
                "in_channels": 3,
                "out_channels": 3,
                "model_channels": 224,
                "channel_mult": (1, 2, 3, 4),
                "num_res_blocks": 2,
                "attention_levels": (1, 2, 3),
                "num_head_channels": 32,
                "groups": 32,
            },
            {
                "model_channels": 16,
                "channel_mult": (1, 2, 3),
                "num_res_blocks": 1,
                "attention_levels": (1, 2),
                "num_head_channels": 8,
                "groups": 8,
            },
        ),
        inputs=lambda real: {
            "x": noise(2, 3, 64, 64) if real else noise(2, 3, 8, 8),
            "timesteps": steps(),
        },
        timestep="timesteps",
        features=_LDM_FEATURES,
        layers=_LDM_LAYERS,
        keys=("timesteps",),
        pure_features=_LDM_FEATURES,
        pure_layers=_LDM_LAYERS,
    ),
    Entry(
        name="scalar-step",
        build=builder(
            ScalarStepNetwork,
            {"channels": 128, "emb": 96, "depth": 12},
            {"channels": 14, "emb": 12, "depth": 3},
        ),
        inputs=lambda real: {
            "x": noise(2, 3, 64, 64) if real else noise(2, 3, 8, 8),
            "timestep": torch.tensor(401),
        },
        features=_SCALAR_FEATURES,
        layers=_SCALAR_LAYERS,
        keys=("timestep",),
        pure_features=_SCALAR_FEATURES,
        pure_layers=_SCALAR_LAYERS,
        bitwise_note="the timestep is of shape () and the features of shape (1, 2C, 1, 1), without the batch; they"
        " are outputs of 1x1 convolutions",
    ),
)
