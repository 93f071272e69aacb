"""Networks whose tokens go to a few of many experts: by each token's choice (HiDream), or by each expert's (Nucleus).

At reduced and published sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel, NucleusMoEImageTransformer2DModel
from torch import nn

from benchmarks.networks.zoo.entry import FLOAT, WORDS, Entry, builder, noise, of_timestep, pair, steps

_HIDREAM_TIME = pair("t_embedder.timestep_embedder")
_HIDREAM_POOLED = pair("p_embedder.pooled_embedder")
_HIDREAM = (
    *(f"{kind}_stream_blocks.0.block.adaLN_modulation.1" for kind in ("double", "single")),
    "final_layer.adaLN_modulation.1",
)

_NUCLEUS_TIME = pair("time_text_embed.timestep_embedder")


def _nucleus(**config: Any) -> nn.Module:
    network: nn.Module = NucleusMoEImageTransformer2DModel(**config)
    for name, parameter in network.named_parameters():
        if name.endswith(
            ("gate_up_proj", "down_proj")
        ):  # diffusers leaves the experts' weights as they are in memory
            nn.init.normal_(parameter, std=0.2)
    return network


def _hidream_inputs(real: bool) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 16, 128, 128) if real else noise(2, 4, 8, 8), "timesteps": steps(),
        "encoder_hidden_states_t5": noise(2, 128, 4096) if real else noise(2, WORDS, 16),
        # The language model's layers come first.
        "encoder_hidden_states_llama3": noise(32, 2, 128, 4096) if real else noise(3, 2, WORDS, 16),
        "pooled_embeds": noise(2, 2048) if real else noise(2, 32), "return_dict": False,
    }  # fmt: skip


def _nucleus_inputs(real: bool) -> dict[str, Any]:
    words = 256 if real else WORDS
    return {
        "hidden_states": noise(2, 4096, 64) if real else noise(2, 16, 16), "timestep": FLOAT / 1000,
        "encoder_hidden_states": noise(2, words, 3584 if real else 16),
        "encoder_hidden_states_mask": torch.ones(2, words, dtype=torch.long),
        "img_shapes": [(1, 64, 64) if real else (1, 4, 4)] * 2,
    }  # fmt: skip


EXPERTS: tuple[Entry, ...] = (
    Entry(
        name="hidream",
        build=builder(
            HiDreamImageTransformer2DModel,
            {"patch_size": 2, "in_channels": 16, "num_layers": 16, "num_single_layers": 32, "attention_head_dim": 128,
             "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048, "axes_dims_rope": (64, 32, 32),
             "max_resolution": (128, 128), "llama_layers": [*range(32), *[31] * 16]},
            {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
             "caption_channels": [16, 16], "text_emb_dim": 32, "axes_dims_rope": (8, 4, 4), "max_resolution": (16, 16),
             "llama_layers": [0, 2]},
        ),
        inputs=_hidream_inputs, timestep="timesteps", features=_HIDREAM, layers=(*_HIDREAM_TIME, *_HIDREAM_POOLED, *_HIDREAM),
        keys=("timesteps", "pooled_embeds"), pure_features=_HIDREAM_TIME[1:], pure_layers=_HIDREAM_TIME,
        bitwise_note="the graph gives each expert all tokens, those of the others as zeros, and adds in another order",
    ),
    of_timestep(
        "nucleus-moe", _nucleus,
        {"in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4,
         "num_key_value_heads": 1, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6), "num_experts": 4,
         "moe_intermediate_dim": 32, "capacity_factors": 2.0, "dense_moe_strategy": "leave_first_block_dense"},
        _nucleus_inputs, before=_NUCLEUS_TIME[:1],
        # The embedding itself meets the tokens where they choose experts.
        features=(_NUCLEUS_TIME[1], *(f"transformer_blocks.{i}.img_mod.1" for i in range(3)), "norm_out.linear"),
        published={"out_channels": 16, "num_key_value_heads": 4},
    ),
)  # fmt: skip
