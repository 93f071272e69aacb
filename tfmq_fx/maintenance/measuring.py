"""Measure the cost and the disturbance of each way to maintain a temporal feature."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.graph_json import packed_tensors, tensors_of
from tfmq_fx.base.metrics import cosine_distance
from tfmq_fx.calibration.data import CalibrationSet, inputs_of
from tfmq_fx.calibration.temporal_rows import (
    chunks_of,
    is_scalar,
    one_sample,
    require_keys_only,
    run_row_by_row,
    run_temporal,
    temporal_rows,
)
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import ancestors, dtype_of, meta_value, node_named
from tfmq_fx.maintenance.choice import CACHE, RECONSTRUCT, Option
from tfmq_fx.maintenance.tables import feature_tables, float_block, key_rows
from tfmq_fx.passes.quantize.cache_temporal import decode, encode, feature_key, is_per_row
from tfmq_fx.passes.quantize.convert import to_integers
from tfmq_fx.passes.quantize.observed import without_observers
from tfmq_fx.passes.quantize.state import state_of, temporal_of
from tfmq_fx.passes.temporal.insert_step_index import TIMESTEPS
from tfmq_fx.passes.temporal.partition_temporal import BLOCK_NAME, extract_temporal, partition_temporal

# The number of calibration rows, spread over the timesteps, on which a feature's effect on the output is measured.
EFFECT_ROWS = 32


def converted_block(gm: GraphModule) -> GraphModule:
    """Return the temporal block alone, converted as `convert` does it."""
    block = extract_temporal(gm, temporal_of(gm))
    block.meta.update(gm.meta)  # torchao's convert needs a mark that its prepare set
    return to_integers(block)


def needed_tensors(gm: GraphModule, block: GraphModule) -> list[dict[str, int]]:
    """Return, for each feature of the converted block, the bytes in the artefact of the tensors that it needs.

    Tensors that the graph also reads outside the block are not counted.
    """
    sizes, outside = stored_bytes(block), _read_outside(gm)
    outputs: Any = block.graph.output_node().args[0]
    found = []
    for node in outputs:
        read = {str(n.target) for n in ancestors([node]) if n.op == "get_attr"}
        found.append({n: sizes[n] for n in sorted(read) if _float_name(n) not in outside})
    return found


def _read_outside(gm: GraphModule) -> set[str]:
    """Return the constants that the graph reads other than for its temporal features."""
    features = {n for n in gm.graph.nodes if n.name in state_of(gm).features}
    seen: set[Node] = set(features)
    stack: list[Node] = [gm.graph.output_node()]
    found: set[str] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
            if node.op == "get_attr":
                found.add(str(node.target))
    return found


def _float_name(name: str) -> str:
    """Return the name of the weight to which an integer tensor, scale or zero point belongs."""
    for suffix in ("_q", "_scale", "_zero_point"):
        name = name.removesuffix(suffix)
    return name


def stored_bytes(gm: GraphModule) -> dict[str, int]:
    """Return the bytes in the artefact of each tensor that a converted graph reads, after bit packing."""
    packed = packed_tensors(gm)
    return {
        name: -(-value.numel() * (packed[name][1] - packed[name][0]).bit_length() // 8)
        if name in packed
        else value.numel() * value.element_size()
        for name, value in tensors_of(gm).items()
    }


def cached_bytes(gm: GraphModule, name: str, cache_type: str) -> dict[str, int]:
    """Return the bytes that a cached feature needs, by tensor.

    These are its columns of the table, and the tables of its key's values, which all features share.
    """
    key, state = feature_key(gm, name), state_of(gm)
    sizes, values = state.sizes, state.tables
    rows = math.prod(sizes[n] for n in key)
    node = node_named(gm, name)
    fake = meta_value(node)
    width = _width(gm, name, fake, is_per_row(gm, key))
    item = {"float16": 2, "bfloat16": 2, "int8": 1}.get(cache_type, dtype_of(node).itemsize)
    found = {f"{name}: cached": rows * (width * item + (4 if cache_type == "int8" else 0))}
    outside = _read_outside(gm)
    for n in key:
        table = TIMESTEPS if n == state.timestep else f"{n}_table"
        if table not in outside:
            found[table] = values[n].numel() * 8  # float64
    return found


def _width(gm: GraphModule, name: str, fake: Any, per_row: bool) -> int:
    if isinstance(fake, Tensor):
        return math.prod(int(d) for d in (fake.shape[1:] if per_row else fake.shape))
    return feature_tables(gm, [name])[name][0].numel()


def measured_options(
    gm: GraphModule,
    calibration: CalibrationSet,
    *,
    reconstructed: list[dict[str, int]],
    cached: Mapping[str, dict[str, int]],
    seed: int,
    effects: bool,
) -> dict[str, dict[str, Option]]:
    """Measure every option: feature -> maintenance -> its cost and its disturbance.

    reconstructed: for each feature, the bytes that it needs if it is reconstructed, by tensor.
    cached: the same if it is cached, for the features that can be.
    effects: True measures the effects on the network's output, too.
    """
    names, cache_type = state_of(gm).features, state_of(gm).recipe.cache_type
    blocks = (extract_temporal(gm, temporal_of(gm)), float_block(gm))
    require_keys_only(gm, blocks[0])
    scalar = run_row_by_row(gm, blocks[1])
    distances: dict[str, list[Tensor]] = {RECONSTRUCT: [], CACHE: []}
    for part in chunks_of(temporal_rows(gm, calibration.tensors)):
        quantized, reference = (run_temporal(b, part, scalar=scalar) for b in blocks)
        distances[RECONSTRUCT].append(cosine_distance(quantized, reference))
        distances[CACHE].append(cosine_distance([_rounded(x, cache_type) for x in reference], reference))
    mean = {m: torch.cat(d, dim=1).mean(1).clamp(min=0).tolist() for m, d in distances.items()}
    effect = _effects(gm, calibration, blocks[0], names, cached, seed=seed) if effects else {}
    found: dict[str, dict[str, Option]] = {}
    for i, name in enumerate(names):
        tensors = {RECONSTRUCT: reconstructed[i], **({CACHE: cached[name]} if name in cached else {})}
        found[name] = {
            m: Option(tensors=t, distance=mean[m][i], effect=effect.get((name, m)))
            for m, t in tensors.items()
        }
    return found


def _rounded(x_N: Tensor, cache_type: str) -> Tensor:
    """Return rows of a feature as a table would return them."""
    return decode(*encode(x_N.float().reshape(len(x_N), -1), cache_type)).reshape(x_N.shape).to(x_N.dtype)


class _Changed(nn.Module):
    """The temporal block with one of its outputs replaced."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.index: int | None = None
        self.value: Tensor | None = None

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        out = list(self.block(*inputs))
        if self.index is not None:
            out[self.index] = self.value
        return tuple(out)


def _effects(
    gm: GraphModule,
    calibration: CalibrationSet,
    quantized: GraphModule,
    names: tuple[str, ...],
    cached: Iterable[str],
    *,
    seed: int,
) -> dict[tuple[str, str], float]:
    """Return (feature, maintenance) -> sum |output - float|^2 / sum |float|^2, with the rest of the network in float.

    Each takes one run of the float network on `EFFECT_ROWS` rows. The effect of a small error is linear in it, and the
    effects of several features add up. The rest is in float because its quantization error would hide the effect
    of a single feature.
    """
    network = without_observers(gm)
    partition_temporal(network, temporal=temporal_of(network))
    changed = _Changed(network.get_submodule(BLOCK_NAME))
    block = changed.block
    network.set_submodule(BLOCK_NAME, changed)
    cached, cache_type = set(cached), state_of(gm).recipe.cache_type
    errors: dict[tuple[str, str], float] = {}
    power = 0.0
    for rows in calibration.spread(EFFECT_ROWS, seed=seed).batches(EFFECT_ROWS, one_timestep=is_scalar(gm)):
        inputs = inputs_of(gm, rows)
        by_name = dict(zip(placeholders(gm), inputs, strict=True))
        changed.index = None
        reference = _flat(network(*inputs))
        power += reference.double().square().sum().item()
        features = block(*[by_name[n] for n in placeholders(block)])  # type: ignore[arg-type]
        other = quantized(*[by_name[n] for n in placeholders(quantized)])
        for i, name in enumerate(names):
            values = {RECONSTRUCT: other[i]}
            if name in cached:
                per_row = is_per_row(gm, feature_key(gm, name))
                flat = features[i] if per_row else features[i][None]
                values[CACHE] = _rounded(flat, cache_type) if per_row else _rounded(flat, cache_type)[0]
            for maintenance, value in values.items():
                changed.index, changed.value = i, value
                error = (_flat(network(*inputs)) - reference).double().square().sum().item()
                errors[name, maintenance] = errors.get((name, maintenance), 0.0) + error
    return {k: e / max(power, 1e-300) for k, e in errors.items()}


def _flat(output: Any) -> Tensor:
    return torch.cat([x.flatten() for x in pytree.tree_leaves(output) if isinstance(x, Tensor)])


def seconds_per_call(gm: GraphModule, block: GraphModule, *, runs: int = 21) -> float:
    """Return the seconds that the block takes for one sample, in eager mode.

    The minimum of `runs` runs is the one that other work on the machine disturbs least.
    """
    key = (state_of(gm).timestep,)
    inputs = one_sample(block, key_rows(gm, key))
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        block(*inputs)
        taken.append(time.perf_counter() - start)
    return min(taken)
