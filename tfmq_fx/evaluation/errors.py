"""Measure how far a quantized network is from the float one, timestep by timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tfmq_fx.base.entries import per_sample
from tfmq_fx.base.metrics import cosine_distance, first_tensor, relative_mse_by_timestep
from tfmq_fx.calibration.data import CalibrationSet, inputs_of
from tfmq_fx.calibration.temporal_rows import (
    chunks_of,
    is_scalar,
    run_row_by_row,
    run_temporal,
    temporal_rows,
)
from tfmq_fx.graph.inputs import placeholders, rows_at_once
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.passes.temporal.partition_temporal import temporal_block_of
from tfmq_fx.runtimes.layers import layers_of

# The output's errors are measured on so many calibration rows, and fewer if that costs more than so many floating-point
# operations; but on a row of each timestep.
ERROR_ROWS, ERROR_FLOPS = 512, 5e11


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The errors of a quantized network, as the report shows them: plain JSON values."""

    by_timestep: list[dict[str, float]]  # of the output, and of the temporal features (mean and worst)
    temporal_drift: dict[str, Any] | None  # of each feature; None if the block needs more than its keys


@torch.no_grad()
def measure_errors(
    gm: GraphModule,
    converted: GraphModule,
    calibration: CalibrationSet,
    *,
    block: GraphModule,
    seed: int = 0,
    outputs: Mapping[int, Tensor | None] | None = None,
) -> Errors:
    """Compare a converted graph with the float graph that it was made from, on rows of the calibration set.

    gm: the float graph. block: its temporal block (`extract_temporal`). seed: of the choice of rows. outputs: the rows to measure, and
    what the float graph makes of them where `calibrate` has collected it; None chooses them (`rows_to_measure`).
    """
    rows: dict[str, Tensor] = {}
    distance = None
    if state_of(converted).features:  # else all come from outside
        rows = temporal_rows(converted, calibration.tensors)
        distance = temporal_distance(converted, block, rows)
    if outputs is None:
        outputs = dict.fromkeys(rows_to_measure(gm, calibration, seed=seed).tolist())
    data = calibration.rows(torch.tensor([*outputs]))
    return Errors(
        by_timestep=errors_by_timestep(gm, converted, data, rows, distance, [*outputs.values()]),
        temporal_drift=temporal_drift(converted, rows, distance),
    )


def rows_to_measure(gm: GraphModule, calibration: CalibrationSet, *, seed: int = 0) -> Tensor:
    """Return the indices of the rows on which the errors of the output are measured."""
    both = 2 * sum(layer.flops for layer in layers_of(gm))  # of a row, in float and quantized
    timesteps = len(calibration.row_timesteps.unique())
    return calibration.draw(max(timesteps, min(ERROR_ROWS, int(ERROR_FLOPS // max(both, 1)))), seed=seed)


def temporal_distance(
    converted: GraphModule, block: GraphModule, rows: Mapping[str, Tensor]
) -> Tensor | None:
    """Return the cosine distances (features, R) to the float block's features, for R rows of its keys.

    None if the block needs more inputs than its keys.
    """
    quantized = temporal_block_of(converted)
    if not placeholders(quantized).keys() <= rows.keys():
        return None
    scalar, count = run_row_by_row(converted, block), len(state_of(converted).features)
    distances = [
        cosine_distance(
            run_temporal(quantized, part, scalar=scalar)[:count], run_temporal(block, part, scalar=scalar)
        )
        for part in chunks_of(rows)
    ]
    return torch.cat(distances, dim=1)


def temporal_drift(
    converted: GraphModule, rows: Mapping[str, Tensor], distance: Tensor | None
) -> dict[str, Any] | None:
    """Return every feature's mean cosine distance at every timestep; None if there are no distances."""
    if distance is None:
        return None
    state = state_of(converted)
    t = rows[state.timestep]
    by_timestep = torch.stack([distance[:, t == value].mean(1) for value in state.timesteps], dim=1)
    return {
        "features": [path.removesuffix(".weight") for path in state.feature_paths],
        "timesteps": state.timesteps.tolist(),
        "cosine_distance": [[float(f"{x:.3e}") for x in row] for row in by_timestep.tolist()],
    }


def errors_by_timestep(
    gm: GraphModule,
    converted: GraphModule,
    data: CalibrationSet,
    rows: Mapping[str, Tensor],
    distance: Tensor | None,
    known: Sequence[Tensor | None] = (),
) -> list[dict[str, float]]:
    """Return the output's relative MSE, and the features' cosine distance (mean and worst), by timestep.

    The output's is that of samples whose timestep, or whose largest one, is this. known: the float graph's first output for each
    row of `data`, as far as it is known.
    """
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    size = rows_at_once(gm, 128, data.without_rows)
    for batch in data.groups(size, one_timestep=is_scalar(gm)):
        given = data.batch(batch)
        inputs = inputs_of(gm, given)
        found = [x for i in batch.tolist() if known and (x := known[i]) is not None]
        reference = torch.cat(found) if len(found) == len(batch) else first_tensor(gm(*inputs))
        outputs.append((first_tensor(converted(*inputs)), reference, per_sample(given[data.timestep])))
    output = relative_mse_by_timestep(*(torch.cat(column) for column in zip(*outputs, strict=True)))
    errors = []
    for t in state_of(converted).timesteps:
        row = {"timestep": t.item()}
        if t.item() in output:
            row["output_relative_mse"] = output[t.item()]
        if distance is not None:
            at = distance[:, rows[data.timestep] == t]
            row["temporal_cosine_distance"] = at.mean().item()
            row["temporal_cosine_distance_worst"] = at.max().item()
        errors.append(row)
    return errors
