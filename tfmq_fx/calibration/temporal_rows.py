"""Run the temporal block alone: the rows of its inputs, and its features on these rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.graph.inputs import placeholders, timestep_input
from tfmq_fx.graph.nodes import meta_value, on_device_of
from tfmq_fx.passes.quantize.plan import rows_are_samples
from tfmq_fx.passes.quantize.state import state_of


def is_scalar(gm: GraphModule) -> bool:
    """Return True if the graph was captured with a timestep of shape ()."""
    value = meta_value(timestep_input(gm, None))
    return isinstance(value, Tensor) and value.dim() == 0


def run_row_by_row(gm: GraphModule, block: GraphModule) -> bool:
    """Return True if an extracted float block must run once per row, so that each feature has a part for each.

    Its timestep has shape (), or dim 0 of a feature is not the batch: it is transposed, or repeated for every frame.
    """
    t = meta_value(timestep_input(gm, None))
    features = [n for n in block.graph.output_node().args[0] if isinstance(n, Node)]  # type: ignore[union-attr]
    return is_scalar(gm) or not all(rows_are_samples(n, t) for n in features)


def inputs_are_keys(gm: GraphModule, block: GraphModule) -> bool:
    """Return True if the block reads no inputs other than the timestep and conditioning."""
    state = state_of(gm)
    return placeholders(block).keys() <= {state.timestep, *state.conditioning}


def require_keys_only(gm: GraphModule, block: GraphModule) -> None:
    """Raise TFMQError unless the block can run on the timestep and conditioning alone."""
    if not inputs_are_keys(gm, block):
        raise TFMQError(
            f"temporal block: needs the inputs {', '.join(placeholders(block))}, not only the timestep and conditioning; "
            "capture with torch.export so that the batch size can be read from the timestep."
        )


def temporal_rows(gm: GraphModule, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs on which the temporal block of a prepared graph is observed and reconstructed, (R, ...) each.

    The rows have every value of each key that selects qparams. Inputs outside the key cycle through the rows of the
    calibration set. If some feature has no table, because an input is not finite or the product is too large,
    every distinct row of the set follows.

    data: the calibration set's tensors by name, (N, ...) each. The rows are on the CPU, as the tables are. Raises TFMQError for one that is missing.
    """
    state = state_of(gm)
    timestep, values, sizes = state.timestep, state.tables, state.sizes
    names = [timestep, *state.conditioning]
    keys = set(state.keys)
    whole = True
    for feature in state.feature_keys:
        key = state.table_key_of(feature)
        whole &= key is not None
        keys.add(key or (timestep,))
    keys = {k for k in keys if not any(set(k) < set(other) for other in keys)}
    missing = [n for n in names if n not in data]
    if missing:
        raise TFMQError(
            f"calibration: no tensor named {missing[0]!r}; found {nearest_names(missing[0], data)}."
        )
    count = len(data[timestep])
    parts: list[dict[str, Tensor]] = []
    for key in sorted(keys):
        index = torch.cartesian_prod(*[torch.arange(sizes[n]) for n in key]).reshape(-1, len(key))
        turn = torch.arange(len(index)) % count
        rows = {n: values[n][index[:, i]].to(data[n].dtype) for i, n in enumerate(key)}
        parts.append({n: rows[n] if n in rows else data[n][turn] for n in names})
    if not whole:
        flat = torch.cat([data[n].double().reshape(count, -1) for n in names], dim=1)
        _, inverse = flat.unique(dim=0, return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(flat)).scatter_reduce_(
            0, inverse, torch.arange(len(flat)), "amin"
        )
        parts.append({n: data[n][first.sort().values] for n in names})
    return {n: torch.cat([part[n] for part in parts]) for n in names}


def chunks_of(rows: Mapping[str, Tensor], size: int = 1024) -> Iterator[dict[str, Tensor]]:
    """Yield the rows in pieces of `size`, because the features of a large product of keys may not fit in memory."""
    count = len(next(iter(rows.values())))
    for start in range(0, count, size):
        yield {n: x[start : start + size] for n, x in rows.items()}


def run_temporal(
    block: GraphModule, rows: Mapping[str, Tensor], *, scalar: bool = False
) -> tuple[Tensor, ...]:
    """Return the temporal features of an extracted block on every row of its inputs: (R, ...) each.

    A partitioned block may also return a step index, which is left out, and what the rest reads of the conditioning
    alone, which comes after the features.

    scalar: True to run it once per row, as a block that was captured with a timestep of shape () must.
    """
    inputs = [on_device_of(node, rows[n]) for n, node in placeholders(block).items()]
    if not scalar:
        return tuple(f for f in block(*inputs) if f.is_floating_point())
    values = [meta_value(n) for n in placeholders(block).values()]
    out = []
    for i in range(len(inputs[0])):
        row = [
            x[i] if isinstance(v, Tensor) and v.dim() == x.dim() - 1 else x[i : i + 1]
            for x, v in zip(inputs, values, strict=True)
        ]
        out.append([f for f in block(*row) if f.is_floating_point()])
    return tuple(torch.stack([row[i] for row in out]) for i in range(len(out[0])))
