"""Look up temporal features in tables of the float network's values at every key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import aten, dtype_of, meta_value, node_named, set_buffer
from tfmq_fx.graph.state import set_state
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.quantize.plan import rows_are_samples
from tfmq_fx.passes.quantize.results import CachedFeature
from tfmq_fx.passes.quantize.state import require_stage, state_of, temporal_of
from tfmq_fx.passes.temporal.insert_step_index import key_index
from tfmq_fx.passes.temporal.partition_temporal import separate
from tfmq_fx.recipe import CACHE_TYPES

EXACT = "exact"  # the type of a table that has the features' own dtype
ROOT = "temporal_cache"  # the prefix of the tables in the state dict


@declare(needs=("prepare",), after=("calibrate", "reconstruct"))
def cache_temporal(
    gm: GraphModule, *, tables: Mapping[str, Tensor], cache_type: str = "float16"
) -> PassResult:
    """Replace temporal features of a calibrated graph with one look-up per key. Remove what no other feature needs.

        step -> .. -> linear(., W_i) = f_i -> rest     ==>    rows = to(index_select(table, 0, step), float32)
        step -> .. -> linear(., W_j) = f_j -> rest            rows[:, a:b] -> rest;  rows[:, b:c] -> rest

    With int8 there is a second look-up, of scales: f_i = rows[:, a:b] * scales[:, i:i+1].

    tables: feature -> (K, ...), its float values at all K values of its key (`feature_key`, row-major), as
        `tfmq_fx.maintenance.feature_tables` computes them from the float block.
    cache_type: "float16", "bfloat16", "int8" with a scale for each key and feature, or "exact", the features' own dtype.

    Numerics: a cached feature is its float value rounded to `cache_type`. The error is at most 2^-11 of the
    value in float16 (3e-8 for values below 6e-5), 2^-8 of it in bfloat16, 1/254 of the row's largest
    absolute value in int8, and none in "exact". A feature that is not in `tables` is bitwise unchanged: if it is computed from a
    cached feature, that feature's layer is kept for it. At a value outside the table, a cached feature takes
    the value of its nearest neighbour.

    The graph's state lists the features that are looked up (`cached`). Removed layers leave its plan. Raises
    TFMQError for an unknown feature, for one without a finite key, and for a table of another size or with
    values that `cache_type` cannot hold.
    """
    state = require_stage(gm, "calibrated", "reconstructed")
    if cache_type not in (*CACHE_TYPES, EXACT):
        raise TFMQError(
            f"cache_type: {cache_type!r} is unknown; use one of {', '.join((*CACHE_TYPES, EXACT))}."
        )
    temporal = temporal_of(gm)
    for name in tables:
        if name not in temporal.features:
            raise TFMQError(
                f"tables: {name!r} is not a temporal feature; features are {nearest_names(name, temporal.features)}."
            )
    done = {c.name for c in state.cached}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in temporal.features:
        if name in tables and name not in done:
            groups.setdefault(feature_key(gm, name), []).append(name)
    if not groups:
        return PassResult(gm, False)
    for key, names in groups.items():
        for name in names:
            _check_table(name, tables[name], rows=_rows(gm, key), cache_type=cache_type)
    before = separate(gm, temporal)
    read = constants_read(gm)
    names_before = {n.name for n in gm.graph.nodes}
    renamed: dict[str, str] = {}
    for key, names in groups.items():
        renamed |= _look_up(gm, key, {n: tables[n] for n in names}, cache_type=cache_type, block=set(before))
    erase_unneeded(gm, before)
    rename_layers(gm, renamed)
    forget(gm, paths=read - constants_read(gm), nodes=names_before - {n.name for n in gm.graph.nodes})
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


def feature_key(gm: GraphModule, name: str) -> tuple[str, ...]:
    """Return the finite inputs that a feature of a prepared graph depends on.

    Raises TFMQError if the feature cannot have a table.
    """
    if (why := uncacheable(gm, name)) is not None:
        raise TFMQError(f"feature {name}: cannot be cached: {why}; maintain it by reconstruction.")
    state = state_of(gm)
    key = state.table_key_of(state.inputs_of_feature(name))
    assert key is not None
    return key


def uncacheable(gm: GraphModule, name: str) -> str | None:
    """Return why a feature of a prepared graph cannot have a table, or None if it can."""
    state = state_of(gm)
    mark = state.inputs_of_feature(name)
    if state.table_key_of(mark) is None:
        unknown = [n for n in mark if n not in state.sizes]
        if unknown:
            return f"it depends on {', '.join(unknown)}, not declared finite"
        product = " x ".join(str(state.sizes[n]) for n in mark)
        return (
            f"{product} values of {', '.join(mark)} exceed max_table_entries={state.recipe.max_table_entries}"
        )
    node = node_named(gm, name)
    if not rows_are_samples(node, meta_value(placeholders(gm)[state.timestep])):
        return "its rows are not the samples of the batch"
    return None


def is_per_row(gm: GraphModule, key: Iterable[str]) -> bool:
    """Return True if each sample of a batch may have another key. False if every input of the key has shape ()."""
    values = {n: meta_value(placeholders(gm)[n]) for n in key}
    return not all(isinstance(v, Tensor) and v.dim() == 0 for v in values.values())


def encode(table_KF: Tensor, cache_type: str) -> tuple[Tensor, Tensor | None]:
    """Return a table as it is stored, and for int8 the scale of each row (K, 1), else None.

    The scale maps max |x| to 127. It is 1 for a row of zeros, and at least the smallest normal number: a 127th of a
    smaller one may be 0.
    """
    if cache_type == EXACT:
        return table_KF, None
    if cache_type != "int8":
        return table_KF.to(getattr(torch, cache_type)), None
    largest = table_KF.abs().amax(1, keepdim=True)
    smallest = torch.finfo(largest.dtype).smallest_normal
    scale = torch.where(largest > 0, (largest / 127).clamp(min=smallest), 1.0)
    return (table_KF / scale).round().clamp(-127, 127).to(torch.int8), scale


def decode(stored_KF: Tensor, scale_K1: Tensor | None) -> Tensor:
    """Invert `encode`: return the table in float32."""
    values = stored_KF.to(torch.float32)
    return values if scale_K1 is None else values * scale_K1


def _rows(gm: GraphModule, key: tuple[str, ...]) -> int:
    return math.prod(state_of(gm).sizes[n] for n in key)


def _check_table(name: str, table: Tensor, *, rows: int, cache_type: str) -> None:
    if table.dim() < 1 or len(table) != rows:
        raise TFMQError(
            f"tables[{name!r}]: found shape {tuple(table.shape)}, but its key has {rows} values; give one row for each."
        )
    if not torch.isfinite(table).all():
        raise TFMQError(f"tables[{name!r}]: found NaN or infinite values; all must be finite.")
    if cache_type == "float16" and table.abs().max() > torch.finfo(torch.float16).max:
        raise TFMQError(
            f"tables[{name!r}]: {table.abs().max().item():g} is too large for float16; use cache_type='bfloat16'."
        )


def _look_up(
    gm: GraphModule,
    key: tuple[str, ...],
    tables: Mapping[str, Tensor],
    *,
    cache_type: str,
    block: set[Node],
) -> dict[str, str]:
    """Insert the look-up of features that share a key.

    Returns old -> new name for their layers, which other features may still need.
    """
    call, nodes = gm.graph.call_function, {n.name: n for n in gm.graph.nodes}
    state = state_of(gm)
    index = key_index(gm, key, timestep=state.timestep, sizes=state.sizes)
    flat = {name: table.detach().reshape(len(table), -1) for name, table in tables.items()}
    if cache_type != EXACT:
        flat = {name: table.float() for name, table in flat.items()}
    stored = {name: encode(table, cache_type) for name, table in flat.items()}
    path = _unused(gm, f"{ROOT}.{'_and_'.join(key)}")
    scales = [scale for _, scale in stored.values() if scale is not None]
    dtypes = {name: dtype_of(nodes[name]) for name in tables}
    common = torch.float32 if scales or len({*dtypes.values()}) > 1 else next(iter(dtypes.values()))
    set_buffer(gm, f"{path}.values", torch.cat([values for values, _ in stored.values()], dim=1))
    with gm.graph.inserting_after(index):
        table = gm.graph.get_attr(f"{path}.values")
    with gm.graph.inserting_after(table):
        rows = call(aten.index_select.default, (table, 0, index))
    with gm.graph.inserting_after(rows):
        values = last = call(aten._to_copy.default, (rows,), {"dtype": common})
    if scales:
        set_buffer(gm, f"{path}.scale", torch.cat(scales, dim=1))
        with gm.graph.inserting_after(last):
            scale_table = gm.graph.get_attr(f"{path}.scale")
        with gm.graph.inserting_after(scale_table):
            factors = call(aten.index_select.default, (scale_table, 0, index))
    cached, renamed, start = [], {}, 0
    for i, (name, table_KF) in enumerate(flat.items()):
        node, end = nodes[name], start + table_KF.shape[1]
        # Insert at the layer's position, so that the features keep their order.
        with gm.graph.inserting_before(node):
            new = call(aten.slice.Tensor, (values, 1, start, end))
            if scales:
                new = call(aten.mul.Tensor, (new, call(aten.slice.Tensor, (factors, 1, i, i + 1))))
            if dtypes[name] != common:
                new = call(aten._to_copy.default, (new,), {"dtype": dtypes[name]})
            shape = list(tables[name].shape[1:])
            if not is_per_row(gm, key):
                new = call(aten.reshape.default, (new, shape))
            elif len(shape) != 1:
                new = call(aten.reshape.default, (new, [-1, *shape]))
        renamed[name] = stand_for(node, new, block=block)
        cached.append(CachedFeature(name=name, key=key, table=f"{path}.values", columns=(start, end)))
        start = end
    set_state(gm, dataclasses.replace(state, cached=(*state.cached, *cached)))
    return renamed


def _unused(gm: GraphModule, path: str) -> str:
    """Return `path`, with a number appended if an earlier run put a table there."""
    taken = {c.table.removesuffix(".values") for c in state_of(gm).cached}
    numbered = (path if i == 1 else f"{path}_{i}" for i in range(1, len(taken) + 2))
    return next(p for p in numbered if p not in taken)


def erase_unneeded(gm: GraphModule, block: list[Node]) -> None:
    """Erase nodes of the block that only the replaced features needed, including in-place operators."""
    needed = set(temporal_of(gm).nodes)
    for node in reversed(block):
        if node.name not in needed and not node.users:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def constants_read(gm: GraphModule) -> set[str]:
    """Return the paths of the constants that the graph reads."""
    return {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}


def stand_for(feature: Node, new: Node, *, block: set[Node]) -> str:
    """Let `new` replace the feature, under the same name, for every reader outside the block.

    Returns the new name of the node that it replaces.
    """
    name = feature.name
    new.meta = {k: v for k, v in feature.meta.items() if k in ("val", "example_value")}
    feature.replace_all_uses_with(new, delete_user_cb=lambda user: user not in block and user is not new)
    feature._rename(f"{name}_layer")
    new.name = name
    return feature.name


def rename_layers(gm: GraphModule, renamed: Mapping[str, str]) -> None:
    """Update the plan for layers whose names other nodes took: old -> new."""
    state = state_of(gm)
    layers = (
        dataclasses.replace(layer, node=renamed.get(layer.node, layer.node)) for layer in state.plan.layers
    )
    plan = dataclasses.replace(state.plan, layers=tuple(layers))
    set_state(gm, dataclasses.replace(state, plan=plan))


def forget(gm: GraphModule, *, paths: set[str], nodes: set[str]) -> None:
    """Remove these layers, floats and notes from the plan, and record the paths in the state (`removed`)."""
    state = state_of(gm)
    plan = state.plan

    def stays(name: str) -> bool:
        return name not in nodes and name.removeprefix("input of ") not in paths

    plan = dataclasses.replace(
        plan,
        layers=tuple(layer for layer in plan.layers if layer.path not in paths),
        floats=tuple(f for f in plan.floats if stays(f.name)),
        notes=tuple(n for n in plan.notes if stays(n.name)),
    )
    removed = tuple(sorted({*state.removed, *paths}))
    set_state(gm, dataclasses.replace(state, plan=plan, removed=removed))
