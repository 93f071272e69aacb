"""Run the temporal block alone: the rows of its inputs, and its features on these rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base.entries import entries_of, packed
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
    every distinct row of the set follows. Each row has one timestep, also where a sample of the set has several, (N, tokens).

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
    data = entries_of({n: data[n] for n in names}, timestep)
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
    block: GraphModule, rows: Mapping[str, Tensor], *, scalar: bool = False, batch: int | None = None
) -> tuple[Tensor, ...]:
    """Return the temporal features of an extracted block on every row of its inputs: (R, ...) each.

    A partitioned block may also return a step index, which is left out, and what the rest reads of the conditioning alone,
    which comes after the features. A block that takes several timesteps per sample, (N, tokens), gets as many rows in one
    sample.

    scalar: True to run it once per row, as a block that was captured with a timestep of shape () must.
    batch: with several timesteps per sample, the number of samples in each run; None: all in one.
    """
    inputs = {n: on_device_of(node, rows[n]) for n, node in placeholders(block).items()}
    if scalar:
        count = len(next(iter(inputs.values())))
        runs = [_floats(block, one_sample(block, inputs, i)) for i in range(count)]
        return tuple(torch.stack(feature) for feature in zip(*runs, strict=True))
    shapes = {n: _sizes_after_batch(node) for n, node in placeholders(block).items()}
    several = next((n for n, x in inputs.items() if x.dim() == 1 and shapes[n]), None)
    if several is None:
        return _floats(block, inputs.values())
    samples, where = packed(inputs, several, shapes[several])
    size = batch or len(samples[several])
    runs = []
    for part in chunks_of(samples, size):
        # The last run has as many samples as the others.
        filled = (torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]) for x in part.values())
        runs.append(_floats(block, filled))
    found = (torch.cat(feature) for feature in zip(*runs, strict=True))
    return tuple(f[where] if len(f) > int(where.max()) else f for f in found)


def one_sample(block: GraphModule, rows: Mapping[str, Tensor], row: int = 0) -> list[Tensor]:
    """Return one row of a block's inputs as a call of one sample takes it.

    That is a timestep of shape (), or the same one for all tokens of the sample.
    """
    found = []
    for name, node in placeholders(block).items():
        x, value = on_device_of(node, rows[name][row]), meta_value(node)
        if not isinstance(value, Tensor) or value.dim() == x.dim() + 1:
            x = x[None]
        elif value.dim() > x.dim():
            x = x.expand(1, *_sizes_after_batch(node))
        found.append(x)
    return found


def _floats(block: GraphModule, inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(f for f in block(*inputs) if f.is_floating_point())


def _sizes_after_batch(node: Node) -> list[int]:
    value = meta_value(node)
    return [int(d) for d in value.shape[1:]] if isinstance(value, Tensor) else []
