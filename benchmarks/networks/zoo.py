"""A zoo of diffusion networks, each with its temporal block written down by hand.

The temporal block of a network is the set of its weighted layers (Linear, ConvNd) whose output depends on
the timestep and on no data: not on the sample, not on token sequences, not on position ids. Per-sample
conditioning vectors (class labels, pooled text, sizes, guidance) that are mixed in ahead of the embedding
layers may count as part of the block (`features`, `layers`, `keys`) or as data (`pure_features`,
`pure_layers`). A temporal feature is the last weighted layer on a path from the timestep: its output meets
data after nothing but views and pointwise operations. A layer of conditioning alone is never a feature.

The ground truth was written from the networks' sources and imports nothing from tfmq_fx, so that it can
disagree with it. `depends` is a second opinion, equally independent: it perturbs one input at a time and
watches which layers' outputs change.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    Kandinsky3UNet,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network, how to call it, and the truth about its temporal block.

    `build(False)` has random weights and a reduced size, `build(True)` the published size (construct it on
    the meta device or under FakeTensorMode); `inputs` gives forward's keyword arguments likewise. The paths
    are those of the reduced size.
    """

    name: str
    build: Callable[[bool], nn.Module]
    inputs: Callable[[bool], dict[str, Any]]
    timestep: str = "timestep"
    features: tuple[str, ...]
    layers: tuple[str, ...]  # the features and every weighted layer ahead of them, conditioning-only ones too
    keys: tuple[
        str, ...
    ]  # the inputs the features are functions of, timestep first, nested names joined by _
    pure_features: tuple[str, ...]
    pure_layers: tuple[str, ...]
    bitwise_note: str = ""


# ---------------------------------------------------------------------------------------------------------
# The perturbation oracle.


def flat(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors among `inputs`, nested names joined by "_"."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}_")
        elif isinstance(value, Tensor):
            found[prefix + name] = value
    return found


def _replace(inputs: Mapping[str, Any], values: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    return {
        name: _replace(value, values, f"{prefix}{name}_")
        if isinstance(value, Mapping)
        else values.get(prefix + name, value)
        for name, value in inputs.items()
    }


def _perturbed(x: Tensor) -> Tensor:
    """Other values of the same kind: integers stay in their range, positive numbers stay positive."""
    if not x.is_floating_point():
        return torch.where(x > 0, x - 1, x + 1)
    # No affine map: a normalization behind the input would undo one.
    wave = 1 + 0.5 * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
    return x * (1 + 0.2 * wave) + 0.1 * wave


@contextmanager
def _recording(network: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Every weighted layer's outputs, call by call, by module path."""
    outputs: dict[str, list[Tensor]] = {}

    def cast(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # A sinusoid is float32 whatever the network is.
        dtype = next(layer.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def record(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _layer, _args, output: outputs[path].append(output.detach().clone())

    handles = []
    for path, layer in network.named_modules():
        if isinstance(layer, WEIGHTED):
            outputs[path] = []
            handles.append(layer.register_forward_pre_hook(cast))
            handles.append(layer.register_forward_hook(record(path)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _differ(a: list[Tensor], b: list[Tensor]) -> bool:
    if len(a) != len(b):
        return True
    # Far above float64's rounding, far below what any real dependence does to a random network.
    return any(
        float((x - y).abs().max()) > 1e-9 * (1 + float(x.abs().max())) for x, y in zip(a, b, strict=True)
    )


@torch.no_grad()
def depends(entry: Entry, network: nn.Module) -> dict[str, frozenset[str]]:
    """For each weighted layer of the reduced network, the inputs whose values change its output.

    Input names are flat, as in `Entry.keys`. A layer that never runs depends on nothing.
    """
    network = copy.deepcopy(network).double().eval()  # in float64 a change is not mistaken for rounding
    inputs = entry.inputs(False)
    base = {name: x.double() if x.is_floating_point() else x for name, x in flat(inputs).items()}

    def run(values: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        with _recording(network) as outputs:
            network(**_replace(inputs, values))
        return outputs

    reference = run(base)
    found: dict[str, set[str]] = {path: set() for path in reference}
    for name, value in base.items():
        for path, outputs in run({**base, name: _perturbed(value)}).items():
            if _differ(reference[path], outputs):
                found[path].add(name)
    return {path: frozenset(names) for path, names in found.items()}


# ---------------------------------------------------------------------------------------------------------
# Helpers of the entries.


def _build(
    make: Callable[..., nn.Module], published: dict[str, Any], small: dict[str, Any]
) -> Callable[[bool], nn.Module]:
    """A network of the published configuration, or of that with the sizes in `small`."""

    def build(real: bool) -> nn.Module:
        if real:
            return make(**published).eval()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            network = make(**{**published, **small}).eval()
            for parameter in network.parameters():
                # A zero-initialised layer (adaLN-zero, the last convolution of a residual branch) would make
                # what lies behind it constant by accident.
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.2)
        return network

    return build


def _noise(*shape: int) -> Tensor:
    """Fixed numbers without a generator, so that this works on the meta device and on fake tensors too."""
    k = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (1.4 * torch.sin(0.7548776662 * k * k)).float().reshape(shape)


def _steps(*values: float) -> Tensor:
    return torch.tensor(values or (17, 803))


def _resnets(
    *, down: Iterable[int], up: Iterable[int], mid: int = 2, projections: tuple[str, ...] = ("time_emb_proj",)
) -> tuple[str, ...]:
    """The time projections of a diffusers U-Net with so many residual blocks per level."""
    blocks = [
        *(f"down_blocks.{i}.resnets.{j}" for i, n in enumerate(down) for j in range(n)),
        *(f"mid_block.resnets.{j}" for j in range(mid)),
        *(f"up_blocks.{i}.resnets.{j}" for i, n in enumerate(up) for j in range(n)),
    ]
    return tuple(f"{block}.{projection}" for block in blocks for projection in projections)


def _pair(module: str) -> tuple[str, str]:
    """diffusers' TimestepEmbedding and PixArtAlphaTextProjection: two Linears."""
    return f"{module}.linear_1", f"{module}.linear_2"


# ---------------------------------------------------------------------------------------------------------
# U-Nets of images without text.

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

_TIME = _pair("time_embedding")
_CIFAR_FEATURES = _resnets(down=(2, 2, 2), up=(3, 3, 3))
_LSUN_FEATURES = _resnets(down=(1, 1, 1, 1), up=(2, 2, 2, 2))
_ADM_FEATURES = (
    *_resnets(down=(1, 1, 1), up=(2, 2, 2)),
    *(f"down_blocks.{i}.downsamplers.0.time_emb_proj" for i in range(2)),
    *(f"up_blocks.{i}.upsamplers.0.time_emb_proj" for i in range(2)),
)
_NCSNPP_FEATURES = (
    *_resnets(down=(1, 1), up=(2, 2)),
    "down_blocks.0.resnet_down.time_emb_proj",
    "up_blocks.0.resnet_up.time_emb_proj",
)


def _image(channels: int, small: int, published: int, **more: Any) -> Callable[[bool], dict[str, Any]]:
    def inputs(real: bool) -> dict[str, Any]:
        size = published if real else small
        return {"sample": _noise(2, channels, size, size), "timestep": _steps(), "return_dict": False} | {
            name: make() for name, make in more.items()
        }

    return inputs


UNETS_2D = (
    Entry(
        name="ddpm-cifar10",
        build=_build(
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
        layers=(*_TIME, *_CIFAR_FEATURES),
        keys=("timestep",),
        pure_features=_CIFAR_FEATURES,
        pure_layers=(*_TIME, *_CIFAR_FEATURES),
    ),
    Entry(
        name="ddpm-lsun",
        build=_build(
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
        layers=(*_TIME, *_LSUN_FEATURES),
        keys=("timestep",),
        pure_features=_LSUN_FEATURES,
        pure_layers=(*_TIME, *_LSUN_FEATURES),
    ),
    Entry(
        name="ddpm-class-conditional",
        build=_build(
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
        layers=(*_TIME, *_CIFAR_FEATURES),
        keys=("timestep", "class_labels"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=_TIME,
        bitwise_note="the labels go through an nn.Embedding, which is no weighted layer",
    ),
    Entry(
        name="adm-scale-shift",
        build=_build(
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
        layers=(*_TIME, *_ADM_FEATURES),
        keys=("timestep",),
        pure_features=_ADM_FEATURES,
        pure_layers=(*_TIME, *_ADM_FEATURES),
        bitwise_note="down- and upsamplers are residual blocks with time projections",
    ),
    Entry(
        name="ncsnpp-fourier",
        build=_build(
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
            "sample": _noise(2, 3, 256, 256) if real else _noise(2, 3, 8, 8),
            "timestep": _steps(0.7, 12.3),
            "return_dict": False,
        },
        features=_NCSNPP_FEATURES,
        layers=(*_TIME, *_NCSNPP_FEATURES),
        keys=("timestep",),
        pure_features=_NCSNPP_FEATURES,
        pure_layers=(*_TIME, *_NCSNPP_FEATURES),
        bitwise_note="float timesteps, positive; the output is divided by the timestep itself",
    ),
)

# ---------------------------------------------------------------------------------------------------------
# U-Nets with text.

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
_SD_FEATURES = _resnets(down=(1, 1, 1), up=(2, 2, 2))
_ADD = _pair("add_embedding")


def _text_to_image(
    real: bool, *, published: int, tokens: int, channels: int = 4, **more: Tensor | dict[str, Tensor]
) -> dict[str, Any]:
    """`published` is the size of the published model's latents, `tokens` the width of its text tokens."""
    size, length, width = (published, 77, tokens) if real else (8, 5, 20)
    return {
        "sample": _noise(2, channels, size, size),
        "timestep": _steps(),
        "encoder_hidden_states": _noise(2, length, width),
        **more,
        "return_dict": False,
    }


UNETS_TEXT = (
    Entry(
        name="sd-1.5",
        build=_build(UNet2DConditionModel, _SD1, _SMALL_SD),
        inputs=lambda real: _text_to_image(real, published=64, tokens=768),
        features=_SD_FEATURES,
        layers=(*_TIME, *_SD_FEATURES),
        keys=("timestep",),
        pure_features=_SD_FEATURES,
        pure_layers=(*_TIME, *_SD_FEATURES),
    ),
    Entry(
        name="sd-2.1",
        build=_build(UNet2DConditionModel, _SD2, {**_SMALL_SD, "attention_head_dim": (2, 3, 5)}),
        inputs=lambda real: _text_to_image(real, published=96, tokens=1024),
        features=_SD_FEATURES,
        layers=(*_TIME, *_SD_FEATURES),
        keys=("timestep",),
        pure_features=_SD_FEATURES,
        pure_layers=(*_TIME, *_SD_FEATURES),
    ),
    Entry(
        name="sd-xl",
        build=_build(
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
                "text_embeds": _noise(2, 1280 if real else 28),
                "time_ids": torch.tensor(
                    [[1024.0, 1024, 0, 0, 1024, 1024], [768.0, 1344, 16, 64, 768, 1344]]
                ),
            },
        ),
        features=_SD_FEATURES,
        layers=(*_TIME, *_ADD, *_SD_FEATURES),
        keys=("timestep", "added_cond_kwargs_text_embeds", "added_cond_kwargs_time_ids"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=_TIME,
    ),
    Entry(
        name="lcm",
        build=_build(
            UNet2DConditionModel,
            {**_SD1, "sample_size": 96, "time_cond_proj_dim": 256},
            {**_SMALL_SD, "time_cond_proj_dim": 12},
        ),
        inputs=lambda real: _text_to_image(
            real, published=96, tokens=768, timestep_cond=_noise(2, 256 if real else 12)
        ),
        features=_SD_FEATURES,
        layers=("time_embedding.cond_proj", *_TIME, *_SD_FEATURES),
        keys=("timestep", "timestep_cond"),
        pure_features=(),
        pure_layers=(),
        bitwise_note="the guidance embedding is added to the sinusoid, ahead of every weighted layer, so that no"
        " layer depends on the timestep alone",
    ),
    Entry(
        name="sd-x4-upscaler",
        build=_build(
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
        layers=(*_TIME, *_SD_FEATURES),
        keys=("timestep", "class_labels"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=_TIME,
        bitwise_note="the labels (noise levels) go through an nn.Embedding, which is no weighted layer",
    ),
    Entry(
        name="sd-unclip",
        build=_build(
            UNet2DConditionModel,
            {**_SD2, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
            {**_SMALL_SD, "attention_head_dim": (2, 3, 5), "projection_class_embeddings_input_dim": 28},
        ),
        inputs=lambda real: _text_to_image(
            real, published=96, tokens=1024, class_labels=_noise(2, 2048 if real else 28)
        ),
        features=_SD_FEATURES,
        layers=(*_TIME, *_pair("class_embedding"), *_SD_FEATURES),
        keys=("timestep", "class_labels"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=_TIME,
        bitwise_note="class_labels is an image embedding, a float vector per sample",
    ),
)

# Kandinsky 3 adds attention-pooled text tokens to the time embedding: data meets it right behind linear_2, and
# the 60-odd Linears that turn the sum into scales and shifts are no part of the block.
UNET_KANDINSKY3 = Entry(
    name="kandinsky-3",
    build=_build(
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
        "sample": _noise(2, 4, 128, 128) if real else _noise(2, 4, 8, 8),
        "timestep": _steps(),
        "encoder_hidden_states": _noise(2, 128, 4096) if real else _noise(2, 5, 12),
        "encoder_attention_mask": torch.arange(128 if real else 5).ge(torch.tensor([[1], [2]])).long(),
        "return_dict": False,
    },
    features=("time_embedding.linear_2",),
    layers=_TIME,
    keys=("timestep",),
    pure_features=("time_embedding.linear_2",),
    pure_layers=_TIME,
    bitwise_note="text tokens are pooled into the time embedding, so that its projections are data",
)

# ---------------------------------------------------------------------------------------------------------
# U-Nets of video and of trajectories.

_3D_FEATURES = _resnets(down=(1, 1), up=(2, 2))
_SVD_FEATURES = _resnets(
    down=(1, 1),
    up=(2, 2),
    projections=("spatial_res_block.time_emb_proj", "temporal_res_block.time_emb_proj"),
)
_1D_FEATURES = _resnets(down=(2, 2, 2), up=(2, 2), projections=("time_emb",))

UNETS_VIDEO = (
    Entry(
        name="text-to-video",
        build=_build(
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
            "sample": _noise(2, 4, 16, 32, 32) if real else _noise(2, 4, 3, 8, 8),
            "timestep": _steps(),
            "encoder_hidden_states": _noise(2, 77, 1024) if real else _noise(2, 5, 20),
            "return_dict": False,
        },
        features=_3D_FEATURES,
        layers=(*_TIME, *_3D_FEATURES),
        keys=("timestep",),
        pure_features=_3D_FEATURES,
        pure_layers=(*_TIME, *_3D_FEATURES),
        bitwise_note="the embedding is repeated once per frame ahead of the projections, so that the features have"
        " batch x frames rows",
    ),
    Entry(
        name="stable-video-diffusion",
        build=_build(
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
            "sample": _noise(2, 14, 8, 72, 128) if real else _noise(2, 3, 8, 8, 8),
            "timestep": _steps(-0.4, 1.6),  # a quarter of the logarithm of sigma
            "encoder_hidden_states": _noise(2, 1, 1024) if real else _noise(2, 1, 20),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02], [12.0, 64.0, 0.1]]),
            "return_dict": False,
        },
        features=_SVD_FEATURES,
        layers=(*_TIME, *_ADD, *_SVD_FEATURES),
        keys=("timestep", "added_time_ids"),
        pure_features=("time_embedding.linear_2",),
        pure_layers=_TIME,
        bitwise_note="float timesteps; time_pos_embed of the transformers embeds the frames' numbers and depends"
        " on no input at all; the embedding is repeated once per frame ahead of the projections",
    ),
    Entry(
        name="diffuser-hopper",
        build=_build(
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
            "sample": _noise(2, 14, 32) if real else _noise(2, 5, 16),
            "timestep": _steps(2, 17),
            "return_dict": False,
        },
        features=_1D_FEATURES,
        layers=(*_pair("time_mlp"), *_1D_FEATURES),
        keys=("timestep",),
        pure_features=_1D_FEATURES,
        pure_layers=(*_pair("time_mlp"), *_1D_FEATURES),
        bitwise_note="Conv1d network; 20 denoising steps",
    ),
)

# ---------------------------------------------------------------------------------------------------------
# Transformers.

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
_PIXART_TIME = _pair("adaln_single.emb.timestep_embedder")
# The output's shift and scale come straight from the embedding, which so is a feature as well.
_PIXART_FEATURES = ("adaln_single.linear", "adaln_single.emb.timestep_embedder.linear_2")
_MMDIT_TIME = _pair("time_text_embed.timestep_embedder")
_MMDIT_TEXT = _pair("time_text_embed.text_embedder")
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
        "hidden_states": _noise(2, 4, size, size) if real else _noise(2, 4, 8, 8),
        "encoder_hidden_states": _noise(2, 120, 4096) if real else _noise(2, 5, 20),
        "timestep": _steps(),
        **more,
        "return_dict": False,
    }


def _flux_inputs(real: bool) -> dict[str, Any]:
    side, text, tokens, width, pooled = (64, 512, 4096, 64, 768) if real else (3, 5, 20, 12, 28)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": _noise(2, side * side, width),
        "encoder_hidden_states": _noise(2, text, tokens),
        "pooled_projections": _noise(2, pooled),
        "timestep": _steps(0.017, 0.803),  # forward multiplies by 1000
        "img_ids": torch.stack([torch.zeros_like(x), y, x], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5, 1.5]),
        "return_dict": False,
    }


TRANSFORMERS = (
    Entry(
        name="dit",
        build=_build(
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
            "hidden_states": _noise(2, 4, 32, 32) if real else _noise(2, 4, 8, 8),
            "timestep": _steps(),
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
        build=_build(
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
        build=_build(
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
            *_pair("adaln_single.emb.resolution_embedder"),
            *_pair("adaln_single.emb.aspect_ratio_embedder"),
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
        build=_build(
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
            "hidden_states": _noise(2, 16, 128, 128) if real else _noise(2, 4, 8, 8),
            "encoder_hidden_states": _noise(2, 154, 4096) if real else _noise(2, 5, 20),
            "pooled_projections": _noise(2, 2048 if real else 28),
            "timestep": _steps(17.5, 803.25),
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
        build=_build(
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
        layers=(*_MMDIT_TIME, *_pair("time_text_embed.guidance_embedder"), *_MMDIT_TEXT, *_FLUX_FEATURES),
        keys=("timestep", "pooled_projections", "guidance"),
        pure_features=("time_text_embed.timestep_embedder.linear_2",),
        pure_layers=_MMDIT_TIME,
        bitwise_note="float timesteps in [0, 1]; img_ids and txt_ids have no batch dimension",
    ),
    Entry(
        name="cogvideox",
        build=_build(
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
            "hidden_states": _noise(2, 13, 16, 60, 90) if real else _noise(2, 3, 4, 4, 6),
            "encoder_hidden_states": _noise(2, 226, 4096) if real else _noise(2, 5, 28),
            "timestep": _steps(),
            "return_dict": False,
        },
        features=_COGVIDEOX_FEATURES,
        layers=(*_TIME, *_COGVIDEOX_FEATURES),
        keys=("timestep",),
        pure_features=_COGVIDEOX_FEATURES,
        pure_layers=(*_TIME, *_COGVIDEOX_FEATURES),
    ),
    Entry(
        name="wan",
        build=_build(
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
            "hidden_states": _noise(2, 16, 21, 60, 104) if real else _noise(2, 4, 3, 4, 6),
            "timestep": _steps(),
            "encoder_hidden_states": _noise(2, 512, 4096) if real else _noise(2, 5, 20),
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

# ---------------------------------------------------------------------------------------------------------
# In the manner of the official DDIM repository (ermongroup/ddim).


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    assert len(timesteps.shape) == 1
    half_dim = embedding_dim // 2
    scale = math.log(10000) / (half_dim - 1)
    frequencies = torch.exp(torch.arange(half_dim, dtype=torch.float32) * -scale).to(device=timesteps.device)
    emb = timesteps.float()[:, None] * frequencies[None, :]
    return torch.cat([torch.sin(emb), torch.cos(emb)], dim=1)


def nonlinearity(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class DDIMResnetBlock(nn.Module):
    def __init__(self, *, in_channels: int, out_channels: int, temb_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h: Tensor = self.conv1(nonlinearity(self.norm1(x)))
        h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


class DDIMAttnBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        b, c, h, w = x.shape
        q = self.q(h_).reshape(b, c, h * w).permute(0, 2, 1)
        k = self.k(h_).reshape(b, c, h * w)
        v = self.v(h_).reshape(b, c, h * w)
        w_ = F.softmax(torch.bmm(q, k) * (int(c) ** -0.5), dim=2)
        h_ = torch.bmm(v, w_.permute(0, 2, 1)).reshape(b, c, h, w)
        y: Tensor = x + self.proj_out(h_)
        return y


class DDIMDownsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class DDIMUpsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class DDIMModel(nn.Module):
    """`temb.dense` holds the embedding, and bare nn.Modules the blocks of each resolution."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_level: int,
        channels: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.ch, self.num_res_blocks, self.num_resolutions = ch, num_res_blocks, len(ch_mult)
        temb_ch = 4 * ch
        self.temb: Any = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb_ch), nn.Linear(temb_ch, temb_ch)])
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)

        def resnet(c_in: int, c_out: int) -> DDIMResnetBlock:
            return DDIMResnetBlock(in_channels=c_in, out_channels=c_out, temb_channels=temb_ch, groups=groups)

        skips, block_in = [ch], ch
        self.down: Any = nn.ModuleList()
        for i, mult in enumerate(ch_mult):
            level: Any = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                level.block.append(resnet(block_in, ch * mult))
                block_in = ch * mult
                if i == attn_level:
                    level.attn.append(DDIMAttnBlock(block_in, groups))
                skips.append(block_in)
            if i != self.num_resolutions - 1:
                level.downsample = DDIMDownsample(block_in)
                skips.append(block_in)
            self.down.append(level)

        self.mid: Any = nn.Module()
        self.mid.block_1 = resnet(block_in, block_in)
        self.mid.attn_1 = DDIMAttnBlock(block_in, groups)
        self.mid.block_2 = resnet(block_in, block_in)

        self.up: Any = nn.ModuleList()
        for i in reversed(range(self.num_resolutions)):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                level.block.append(resnet(block_in + skips.pop(), ch * ch_mult[i]))
                block_in = ch * ch_mult[i]
                if i == attn_level:
                    level.attn.append(DDIMAttnBlock(block_in, groups))
            if i != 0:
                level.upsample = DDIMUpsample(block_in)
            self.up.insert(0, level)

        self.norm_out = nn.GroupNorm(groups, block_in, eps=1e-6)
        self.conv_out = nn.Conv2d(block_in, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = get_timestep_embedding(t, self.ch)
        temb = self.temb.dense[0](temb)
        temb = nonlinearity(temb)
        temb = self.temb.dense[1](temb)

        hs = [self.conv_in(x)]
        for i in range(self.num_resolutions):
            for j in range(self.num_res_blocks):
                h = self.down[i].block[j](hs[-1], temb)
                if len(self.down[i].attn) > 0:
                    h = self.down[i].attn[j](h)
                hs.append(h)
            if i != self.num_resolutions - 1:
                hs.append(self.down[i].downsample(hs[-1]))

        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)

        for i in reversed(range(self.num_resolutions)):
            for j in range(self.num_res_blocks + 1):
                h = self.up[i].block[j](torch.cat([h, hs.pop()], dim=1), temb)
                if len(self.up[i].attn) > 0:
                    h = self.up[i].attn[j](h)
            if i != 0:
                h = self.up[i].upsample(h)

        y: Tensor = self.conv_out(nonlinearity(self.norm_out(h)))

        return y


# ---------------------------------------------------------------------------------------------------------
# In the manner of latent diffusion (CompVis/latent-diffusion, openaimodel.py), after guided-diffusion.


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
    args = timesteps[:, None].float() * freqs.to(device=timesteps.device)[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class TimestepBlock(nn.Module):
    """Any module whose forward takes the time embedding as its second argument."""


class TimestepEmbedSequential(nn.Sequential):
    """A sequential that hands the time embedding to those of its children that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class LDMResBlock(TimestepBlock):
    def __init__(self, channels: int, emb_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        for parameter in out.parameters():
            nn.init.zeros_(parameter)
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, out_channels), nn.SiLU(), nn.Dropout(0.0), out)
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        h = self.out_layers(h + emb_out)
        y: Tensor = self.skip_connection(x) + h
        return y


class LDMAttentionBlock(nn.Module):
    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        ch = c // self.num_heads
        q, k, v = qkv.reshape(b * self.num_heads, ch * 3, -1).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h: Tensor = self.proj_out(torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1))
        return (x + h).reshape(b, c, *spatial)


class LDMDownsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.op(x)
        return y


class LDMUpsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return y


class LDMUNetModel(nn.Module):
    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: tuple[int, ...],
        num_res_blocks: int,
        attention_levels: tuple[int, ...],
        num_head_channels: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        emb = model_channels * 4
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(in_channels, model_channels, 3, padding=1))]
        )
        skips, ch = [model_channels], model_channels
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [LDMResBlock(ch, emb, mult * model_channels, groups)]
                ch = mult * model_channels
                if level in attention_levels:
                    layers.append(LDMAttentionBlock(ch, num_head_channels, groups))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level != len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(LDMDownsample(ch)))
                skips.append(ch)

        self.middle_block = TimestepEmbedSequential(
            LDMResBlock(ch, emb, ch, groups),
            LDMAttentionBlock(ch, num_head_channels, groups),
            LDMResBlock(ch, emb, ch, groups),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [LDMResBlock(ch + skips.pop(), emb, mult * model_channels, groups)]
                ch = mult * model_channels
                if level in attention_levels:
                    layers.append(LDMAttentionBlock(ch, num_head_channels, groups))
                if level and i == num_res_blocks:
                    layers.append(LDMUpsample(ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        out = nn.Conv2d(ch, out_channels, 3, padding=1)
        for parameter in out.parameters():
            nn.init.zeros_(parameter)
        self.out = nn.Sequential(nn.GroupNorm(groups, ch), nn.SiLU(), out)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        hs = []
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h = x
        for module in self.input_blocks:
            h = module(h, emb)
            hs.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, hs.pop()], dim=1), emb)
        y: Tensor = self.out(h)
        return y


# ---------------------------------------------------------------------------------------------------------
# A network with one timestep for the whole batch.


class ScalarModulation(nn.Module):
    """A convolution scaled and shifted by the embedding, which is a one-pixel image of batch size 1."""

    def __init__(self, channels: int, emb: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Conv2d(emb, 2 * channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(F.silu(emb)).chunk(2, dim=1)
        y: Tensor = x + F.silu(self.conv(self.norm(x) * (1 + scale) + shift))
        return y


class ScalarStepNetwork(nn.Module):
    """Its timestep is a tensor of shape (), its embedding and its projections are convolutions."""

    def __init__(self, *, channels: int, emb: int, depth: int) -> None:
        super().__init__()
        self.emb = emb
        self.embed_in = nn.Linear(emb, 3 * emb)
        self.embed_out = nn.Conv2d(3 * emb, emb, 1)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ScalarModulation(channels, emb) for _ in range(depth))
        self.head = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        k = torch.arange(self.emb // 2, dtype=torch.float32, device=timestep.device)
        angle = timestep.float() * torch.exp(-math.log(10000) * k / (self.emb // 2))
        wave = torch.cat([angle.sin(), angle.cos()]).unsqueeze(0)
        emb = self.embed_out(F.gelu(self.embed_in(wave))[:, :, None, None])
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, emb)
        y: Tensor = self.head(h)
        return y


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
        build=_build(
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
        inputs=lambda real: {"x": _noise(2, 3, 32, 32) if real else _noise(2, 3, 8, 8), "t": _steps()},
        timestep="t",
        features=_DDIM_FEATURES,
        layers=_DDIM_LAYERS,
        keys=("t",),
        pure_features=_DDIM_FEATURES,
        pure_layers=_DDIM_LAYERS,
    ),
    Entry(
        name="latent-diffusion",
        build=_build(
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
            "x": _noise(2, 3, 64, 64) if real else _noise(2, 3, 8, 8),
            "timesteps": _steps(),
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
        build=_build(
            ScalarStepNetwork,
            {"channels": 128, "emb": 96, "depth": 12},
            {"channels": 14, "emb": 12, "depth": 3},
        ),
        inputs=lambda real: {
            "x": _noise(2, 3, 64, 64) if real else _noise(2, 3, 8, 8),
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

ZOO: tuple[Entry, ...] = (*UNETS_2D, *UNETS_TEXT, UNET_KANDINSKY3, *UNETS_VIDEO, *TRANSFORMERS, *PLAIN)
