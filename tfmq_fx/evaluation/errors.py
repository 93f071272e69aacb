"""Measure how far a quantized network is from the float one, timestep by timestep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.drop_in import QuantizedGraph
from tfmq_fx.base.metrics import cosine_distance, relative_mse_by_timestep
from tfmq_fx.calibration.data import CalibrationSet, inputs_of
from tfmq_fx.calibration.temporal_rows import chunks_of, is_scalar, run_temporal
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal

ERROR_ROWS = 512  # calibration rows on which the report's errors by timestep are measured


@torch.no_grad()
def temporal_distance(
    gm: GraphModule, temporal: TemporalBlock, quantized: QuantizedGraph, rows: Mapping[str, Tensor]
) -> Tensor | None:
    """(features, R) cosine distances to the float features; None where the block needs more than its keys."""
    if not placeholders(quantized.temporal_block).keys() <= rows.keys():
        return None
    scalar = is_scalar(gm)
    float_block = extract_temporal(gm, temporal)
    distances = [
        cosine_distance(
            run_temporal(quantized.temporal_block, part, scalar=scalar),
            run_temporal(float_block, part, scalar=scalar),
        )
        for part in chunks_of(rows)
    ]
    return torch.cat(distances, dim=1)


def temporal_drift(
    gm: GraphModule,
    features: list[str],
    quantized: QuantizedGraph,
    rows: Mapping[str, Tensor],
    distance: Tensor | None,
) -> dict[str, Any] | None:
    """Every feature's mean cosine distance at every timestep."""
    if distance is None:
        return None
    t = rows[gm.meta["timestep"]]
    by_timestep = torch.stack([distance[:, t == value].mean(1) for value in quantized.timesteps], dim=1)
    return {
        "features": features,
        "timesteps": quantized.timesteps.tolist(),
        "cosine_distance": [[float(f"{x:.3e}") for x in row] for row in by_timestep.tolist()],
    }


@torch.no_grad()
def errors_by_timestep(
    gm: GraphModule,
    quantized: QuantizedGraph,
    data: CalibrationSet,
    rows: Mapping[str, Tensor],
    distance: Tensor | None,
) -> list[dict[str, float]]:
    """By timestep: relative MSE of the output; cosine distance of the temporal features, their mean and worst."""
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in data.batches(128, one_timestep=is_scalar(gm)):
        inputs = inputs_of(gm, batch)
        outputs.append(
            (first_tensor(quantized.network(*inputs)), first_tensor(gm(*inputs)), batch[data.timestep])
        )
    output = relative_mse_by_timestep(*(torch.cat(column) for column in zip(*outputs, strict=True)))
    errors = []
    for t in quantized.timesteps:
        row = {"timestep": t.item()}
        if t.item() in output:
            row["output_relative_mse"] = output[t.item()]
        if distance is not None:
            at = distance[:, rows[data.timestep] == t]
            row["temporal_cosine_distance"] = at.mean().item()
            row["temporal_cosine_distance_worst"] = at.max().item()
        errors.append(row)
    return errors


def first_tensor(output: Any) -> Tensor:
    leaf: Tensor = pytree.tree_leaves(output)[0]
    return leaf
