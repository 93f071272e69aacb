"""Show what quantization would do to a network: the temporal block, and every layer's bits."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tfmq_fx.artefact.interface import Interface
from tfmq_fx.artefact.saving import is_artefact
from tfmq_fx.base.arguments import leaves, nested
from tfmq_fx.base.errors import TFMQError, first_line, nearest_names
from tfmq_fx.base.signatures import parameters_of
from tfmq_fx.capturing.calibrated import capture_rows
from tfmq_fx.graph.inputs import choose_timestep
from tfmq_fx.passes.quantize.plan import plan
from tfmq_fx.passes.temporal.find_temporal import find_temporal
from tfmq_fx.recipe import Recipe


def describe(
    network: nn.Module,
    example: dict[str, Any],
    recipe: Recipe,
    *,
    timestep: str | None = None,
    conditioning: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Return what quantization would do to a network, as plain JSON values.

    They hold sizes, what shapes the inputs may have ("N": the batch), seconds, the temporal block's features with the inputs that they depend on, and the plan
    of the layers.

    example: forward's keyword arguments, as for `capture`.
    timestep: the name of the timestep's argument, as for `capture`.
    conditioning: as for `find_temporal`.
    """
    if "return_dict" in parameters_of(network):
        example = {**example, "return_dict": False}
    started = time.monotonic()
    gm, taken = capture_rows(
        network, example, timestep or choose_timestep({n: x for n, (_, x) in leaves(example).items()})
    )
    captured = time.monotonic()
    temporal = find_temporal(gm, conditioning=conditioning)
    found = time.monotonic()
    layers = plan(gm, recipe=recipe, temporal=temporal)
    paths = {layer.node: layer.path.removesuffix(".weight") for layer in layers.layers}
    return {
        "network": type(network).__name__,
        "parameters": sum(p.numel() for p in network.parameters()),
        "nodes": len(gm.graph.nodes),
        "inputs": Interface.of(network, gm, taken).sizes(),
        "seconds": {"capture": round(captured - started, 3), "find": round(found - captured, 3)},
        "temporal_block": {
            "nodes": len(temporal.nodes),
            "keys": list(temporal.keys),
            "features": [
                {"path": paths.get(name, name), "keys": list(keys)}
                for name, keys in zip(temporal.features, temporal.feature_keys, strict=True)
            ],
        },
        "layers": [dataclasses.asdict(layer) for layer in layers.layers],
        "float": [dataclasses.asdict(f) for f in layers.floats],
        "notes": [dataclasses.asdict(n) for n in layers.notes],
    }


def require_plain_files(folder: Path) -> None:
    """Raise TFMQError if a folder of diffusers, or one in it, has only weights of a variant (*.fp16.safetensors).

    diffusers would say that it finds no weights.
    """
    for place in (folder, *(f for f in sorted(folder.iterdir()) if f.is_dir())):
        found = [_WEIGHTS.fullmatch(f.name) for f in place.iterdir()]
        variants = [m["variant"] for m in found if m is not None]
        if variants and None not in variants:
            raise TFMQError(
                f"{place}: has only {variants[0]} weights; choose them with --variant {variants[0]}."
            )


# model.safetensors, diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, ..
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_|pytorch_)?model(\.(?P<variant>[a-z]\w*))?(-\d+-of-\d+)?\.(safetensors|bin)"
)


def load_network(folder: Path, *, weights: bool = True) -> nn.Module:
    """Load a diffusers network from its folder (config.json), in eval mode.

    weights: False gives fake weights, so that the network can be of any size.

    Raises TFMQError for an artefact, and for a folder that diffusers cannot load.
    """
    import diffusers

    if is_artefact(folder):
        raise TFMQError(
            f"{folder}: is quantized; its report.json says how. Give the folder of the float network."
        )
    try:
        if weights:
            network = diffusers.AutoModel.from_pretrained(str(folder))
        else:
            config: dict[str, Any] = diffusers.AutoModel.load_config(str(folder))
            cls: Any = getattr(diffusers, str(config.get("_class_name")), None)
            if not (inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)):
                raise TFMQError(
                    f"{folder}: config.json names {config.get('_class_name')!r}, which is not a diffusers network."
                )
            with FakeTensorMode(allow_non_fake_inputs=True):
                network = cls.from_config(config)  # type: ignore[attr-defined]
    except TFMQError:
        raise
    except Exception as error:  # diffusers, safetensors and json raise many types
        raise TFMQError(
            f"{folder}: diffusers cannot load it ({type(error).__name__}: {first_line(error)})"
        ) from error
    assert isinstance(network, nn.Module)
    return network.eval()


def example_inputs(network: nn.Module, specs: Iterable[str]) -> dict[str, Any]:
    """Return forward's arguments, made from texts.

    specs: texts like "sample=2,4,64,64" and "added_cond_kwargs.time_ids=2,6:int64".

    Floats are normal noise, integers count up from 0. For a network with fake weights, the tensors are fake
    too. Raises TFMQError for a malformed text, and for an argument that forward lacks.
    """
    known = list(parameters_of(network))
    fake = next((p.fake_mode for p in network.parameters() if hasattr(p, "fake_mode")), None)
    found: dict[tuple[str | int, ...], Tensor] = {}
    with fake or nullcontext():
        for spec in specs:
            name, _, rest = spec.partition("=")
            shape, _, kind = rest.partition(":")
            dtype = getattr(torch, kind or "float32", None)
            try:
                sizes = [int(s) for s in shape.split(",") if s]
            except ValueError:
                sizes = []
            if (
                not rest
                or not isinstance(dtype, torch.dtype)
                or any(s < 1 for s in sizes)
                or (shape and not sizes)
            ):
                raise TFMQError(
                    f"--input {spec!r}: use NAME=SHAPE or NAME=SHAPE:DTYPE, e.g. timestep=2:int64."
                )
            path = tuple(name.split("."))
            if path[0] not in known:
                raise TFMQError(
                    f"--input {spec!r}: {type(network).__name__} takes {nearest_names(path[0], known)}."
                )
            count = torch.Size(sizes).numel()
            found[path] = (
                torch.randn(sizes, dtype=dtype)
                if dtype.is_floating_point
                else torch.arange(count).reshape(sizes).to(dtype)
            )
    if not found:
        raise TFMQError(
            f"--input: {type(network).__name__} alone has no pipeline that shows how it is called; give the shape of each input "
            f"that it needs ({', '.join(known)}), as NAME=SHAPE."
        )
    return nested(found)
