"""Compute the float values of temporal features at every value of their key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from tfmq_fx.calibration.temporal_rows import chunks_of, is_scalar, require_keys_only, run_temporal
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fixed_size, meta_value
from tfmq_fx.passes.quantize.cache_temporal import feature_key, is_per_row
from tfmq_fx.passes.quantize.observed import without_observers
from tfmq_fx.passes.quantize.state import state_of, temporal_of
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal


@torch.no_grad()
def feature_tables(
    gm: GraphModule, features: Iterable[str] | None = None, *, batch: int | None = None
) -> dict[str, Tensor]:
    """Return the float values of temporal features of a prepared graph at every value of their key: feature -> (K, ...).

    They are computed in pieces of 1024 rows, or row by row if the timestep has shape ().

    features: their names; None for all.
    batch: compute each value as a call of the network with so many equal samples does. Libraries of matrix products
        choose their order of summation by the number of rows, so the value is that call's, bit for bit.

    Raises TFMQError for a feature without a finite key, and for a block that needs inputs other than its keys.
    """
    all_features = state_of(gm).features
    names = list(all_features if features is None else features)
    keys = {name: feature_key(gm, name) for name in names}
    block = float_block(gm)
    require_keys_only(gm, block)
    scalar = is_scalar(gm)
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(keys.values()):
        wanted = [n for n in names if keys[n] == key]
        pieces: dict[str, list[Tensor]] = {n: [] for n in wanted}
        for part in chunks_of(key_rows(gm, key)):
            computed = (
                _in_batches(block, part, batch)
                if batch and not scalar
                else run_temporal(block, part, scalar=scalar)
            )
            values = dict(zip(all_features, computed, strict=True))
            for name in wanted:
                value = values[name]
                # With a scalar timestep, rows run one by one. Features that other inputs join keep a batch of one.
                pieces[name].append(value[:, 0] if scalar and is_per_row(gm, key) else value)
        found |= {n: torch.cat(pieces[n]) for n in wanted}
    return found


def _in_batches(block: GraphModule, rows: Mapping[str, Tensor], batch: int) -> tuple[Tensor, ...]:
    """Return the block's features on each row (R, ...), each computed in a batch of `batch` equal rows.

    A block that takes several timesteps per sample computes as many of them in each batch.
    """
    if any(meta_value(n).dim() > rows[name].dim() for name, n in placeholders(block).items()):
        return run_temporal(block, rows, batch=batch)
    count = len(next(iter(rows.values())))
    found = []
    for i in range(count):
        same = {n: x[i : i + 1].expand(batch, *x.shape[1:]) for n, x in rows.items()}
        found.append([feature[:1] for feature in run_temporal(block, same)])
    return tuple(torch.cat(feature) for feature in zip(*found, strict=True))


def key_rows(gm: GraphModule, key: tuple[str, ...]) -> dict[str, Tensor]:
    """Return every value of a key, row-major, as inputs of the block, with zeros for inputs outside the key."""
    state = state_of(gm)
    values, sizes = state.tables, state.sizes
    index = torch.cartesian_prod(*[torch.arange(sizes[n]) for n in key]).reshape(-1, len(key))
    rows = {}
    for name in (state.timestep, *state.conditioning):
        fake = meta_value(placeholders(gm)[name])
        if name in key:
            value = values[name][index[:, key.index(name)]]
            rows[name] = value.to(fake.dtype) if isinstance(fake, Tensor) else value
        else:
            sizes_of_one = [fixed_size(d) for d in fake.shape[1:]]
            rows[name] = torch.zeros([len(index), *sizes_of_one], dtype=fake.dtype)  # type: ignore[list-item]
    return rows


def float_block(gm: GraphModule) -> GraphModule:
    """Return the float temporal block of a prepared graph."""
    floats = without_observers(gm)
    return extract_temporal(floats, temporal_of(floats))
