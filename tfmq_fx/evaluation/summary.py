"""Put together the report of what was quantized how."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from tfmq_fx.artefact.graph_json import packed_tensors, quantized_weights, tensors_of
from tfmq_fx.base.progress import Clock
from tfmq_fx.passes.pass_manager import LOW_BITS
from tfmq_fx.recipe import Recipe


def summary(
    gm: GraphModule,
    network: nn.Module,
    recipe: Recipe,
    seed: int,
    clock: Clock,
    errors: list[dict[str, float]],
) -> dict[str, Any]:
    plan = gm.meta["plan"]
    integers = quantized_weights(gm)
    tensors = tensors_of(gm)
    layers = [dataclasses.asdict(layer) for layer in plan.layers]
    floats = [dataclasses.asdict(f) for f in plan.floats]
    quantized = {layer.path for layer in plan.layers if f"{layer.path}_q" in integers}
    left = {n: p for n, p in network.named_parameters() if n not in gm.meta.get("removed", ())}
    for name, p in left.items():
        if name not in quantized and name not in {f["name"] for f in floats}:
            floats.append(
                {
                    "name": name,
                    "reason": "bias or affine parameter"
                    if p.dim() <= 1
                    else "no convolution or linear weight",
                }
            )
    packed = packed_tensors(gm)
    packed_bytes = sum(
        tensors[n].numel() * (high - low).bit_length() / 8 for n, (low, high) in packed.items()
    )
    other_bytes = sum(x.numel() * x.element_size() for n, x in tensors.items() if n not in packed)
    changes = [change for name in LOW_BITS for change in gm.meta.get(name, ())]
    added = {t for change in changes for t in change.tensors}
    float_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
    return {
        "recipe": recipe.to_json(),
        "seed": seed,
        "layers": layers,
        "float": floats,
        "notes": [dataclasses.asdict(n) for n in plan.notes],
        "sizes": {
            "float_bytes": float_bytes,
            "quantized_bytes": round(packed_bytes + other_bytes),
            "low_bits_bytes": sum(tensors[n].numel() * tensors[n].element_size() for n in added),
            "ratio": (packed_bytes + other_bytes) / float_bytes,
            "quantized_weights": sum(tensors[n].numel() for n in integers),
            "float_parameters": sum(p.numel() for n, p in left.items() if n not in quantized),
        },
        "low_bits": {
            name: [dataclasses.asdict(change) for change in gm.meta[name]]
            for name in LOW_BITS
            if name in gm.meta
        },
        "temporal_block": {
            "features": len(gm.meta["features"]),
            "timesteps": len(gm.meta["timesteps"]),
            "finite": {name: len(values) for name, values in gm.meta["finite"].items()},
            "keys": {f: list(k) for f, k in zip(gm.meta["features"], gm.meta["feature_keys"], strict=True)},
        },
        "maintenance": {"maintain": recipe.maintain, **gm.meta.get("maintenance", {})},
        "reconstruction": [dataclasses.asdict(r) for r in gm.meta.get("reconstruction", ())],
        "errors_by_timestep": errors,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
