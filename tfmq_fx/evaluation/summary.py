"""Assemble the report of what was quantized, and how."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tfmq_fx.artefact.graph_json import packed_tensors, quantized_weights, tensors_of
from tfmq_fx.base.progress import Clock
from tfmq_fx.evaluation.errors import Errors
from tfmq_fx.graph.float8 import float8_weights
from tfmq_fx.passes.quantize.results import Maintenance
from tfmq_fx.passes.quantize.state import State, state_of


def summary(
    gm: GraphModule, network: nn.Module, *, seed: int, clock: Clock, errors: Errors
) -> dict[str, Any]:
    """Return the report of a converted graph as plain JSON values.

    network: the float network, for its parameters. clock: the times of the stages.
    """
    state = state_of(gm)
    quantized, tensors = {*quantized_weights(gm), *float8_weights(gm)}, tensors_of(gm)
    layers = {layer.path for layer in state.plan.layers if f"{layer.path}_q" in quantized}
    folded = {path for paths in state.folded.values() for path in paths} - state.folded.keys()
    gone = {*state.removed, *(folded - tensors.keys())}
    left = {n: p for n, p in network.named_parameters() if n not in gone}
    return {
        "recipe": state.recipe.to_json(),
        "seed": seed,
        "layers": [dataclasses.asdict(layer) for layer in state.plan.layers],
        "float": _floats(state, left, layers),
        "notes": [dataclasses.asdict(n) for n in state.plan.notes],
        "sizes": {
            **_sizes(gm, state, network, tensors),
            "quantized_weights": sum(tensors[n].numel() for n in quantized),
            "float_parameters": sum(p.numel() for n, p in left.items() if n not in layers),
        },
        "low_bits": {
            name: [dataclasses.asdict(change) for change in changes]
            for name, changes in state.low_bits.items()
        },
        "temporal_block": {
            "features": len(state.features),
            "timesteps": len(state.timesteps),
            "finite": {name: len(values) for name, values in state.finite.items()},
            "keys": {f: list(k) for f, k in zip(state.features, state.feature_keys, strict=True)},
        },
        "maintenance": {"maintain": state.recipe.maintain, **plain_maintenance(state.maintenance)},
        "reconstruction": [dataclasses.asdict(r) for r in state.reconstruction],
        "errors_by_timestep": errors.by_timestep,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "versions": versions(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "temporal_drift": errors.temporal_drift,
    }


def _floats(state: State, left: Mapping[str, nn.Parameter], quantized: set[str]) -> list[dict[str, Any]]:
    """Return what stays in float, and why: first what the plan lists, then every other parameter.

    left: the network's parameters that are still in use. quantized: the names of those that are quantized.
    """
    found = [dataclasses.asdict(f) for f in state.plan.floats]
    said = {f["name"] for f in found}
    for name, p in left.items():
        if name not in quantized and name not in said:
            reason = "bias or affine parameter" if p.dim() <= 1 else "not a convolution or linear weight"
            found.append({"name": name, "reason": reason})
    return found


def _sizes(
    gm: GraphModule, state: State, network: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    packed = packed_tensors(gm)
    packed_bytes = sum(
        tensors[n].numel() * (high - low).bit_length() / 8 for n, (low, high) in packed.items()
    )
    other_bytes = sum(x.numel() * x.element_size() for n, x in tensors.items() if n not in packed)
    added = {t for changes in state.low_bits.values() for change in changes for t in change.tensors}
    added &= tensors.keys()  # converting folds what is computed of constants alone
    kept = network.state_dict().keys()  # what a file of the network holds: tables that are buffers, too
    buffers = (b for n, b in network.named_buffers() if n in kept)
    float_bytes = sum(p.numel() * p.element_size() for p in (*network.parameters(), *buffers))
    return {
        "float_bytes": float_bytes,
        "quantized_bytes": round(packed_bytes + other_bytes),
        "low_bits_bytes": sum(tensors[n].numel() * tensors[n].element_size() for n in added),
        "ratio": (packed_bytes + other_bytes) / float_bytes,
    }


def plain_maintenance(maintenance: Maintenance | None) -> dict[str, Any]:
    """Return the decisions on the temporal features as plain JSON values; {} if there were none."""
    if maintenance is None:
        return {}
    found = dataclasses.asdict(maintenance)
    return {**found, "features": list(found["features"])}


def versions() -> dict[str, str]:
    """Return the versions that the numbers of a report may depend on."""
    return {"torch": torch.__version__, "python": platform.python_version()}
