"""What gives each temporal feature at inference, the quantized block or a table: measured, chosen and done.

The two ways and the choice between them are those of *Temporal Feature Matters* (arXiv 2407.19547): TIB-based and
cache-based maintenance, disturbance-aware selection. Its full text was not available; measures and rules are ours.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tfmq_fx.calibration import CalibrationSet, inputs_of
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import ancestors, fixed_size, meta_value, placeholders
from tfmq_fx.graph_json import packed_tensors, tensors_of
from tfmq_fx.metrics import cosine_distance
from tfmq_fx.passes.annotate import Note
from tfmq_fx.passes.cache_temporal import (
    cache_temporal,
    decode,
    encode,
    feature_key,
    is_per_row,
    table_sizes,
    uncacheable,
)
from tfmq_fx.passes.convert import to_integers
from tfmq_fx.passes.find_temporal import temporal_of
from tfmq_fx.passes.insert_step_index import TIMESTEPS
from tfmq_fx.passes.partition_temporal import BLOCK_NAME, extract_temporal, partition_temporal
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.prepare import require_stage, without_observers
from tfmq_fx.temporal import chunks_of, is_scalar, require_keys_only, run_temporal, tables, temporal_rows

EFFECT_ROWS = (
    32  # calibration rows, spread over the timesteps, on which a feature's effect on the output is measured
)
RECONSTRUCT, CACHE = "reconstruct", "cache"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to maintain one feature."""

    tensors: Mapping[str, int]  # what it needs in the artefact: name -> bytes; features may share names
    distance: float  # mean cosine distance of the feature to float, over its keys
    effect: float | None = None  # relative squared error that it alone makes in the network's output

    @property
    def disturbance(self) -> float:
        """What the bound is on: the larger of two squared relative errors, of the feature and of the output."""
        return max(self.distance, self.effect or 0.0)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A row of the report's table."""

    feature: str  # node name
    path: str  # its layer's weight in the network's state dict; its node's name where it has none
    key: tuple[str, ...]  # the inputs that select the row of a table; () where it can have none
    bytes: dict[str, int]  # by maintenance: of what no other feature needs
    disturbance: dict[str, float]  # by maintenance: cosine distance
    effect: dict[
        str, float
    ]  # by maintenance: relative squared error of the output; {} where it was not measured
    chosen: str
    why: str


@declare(needs=("calibrate",), after=("reconstruct",))
@torch.no_grad()
def maintain(gm: GraphModule, calibration: CalibrationSet, *, seed: int = 0) -> GraphModule:
    """Give each temporal feature of a calibrated graph its maintenance, in place, by `recipe.maintain`.

    "reconstruct": nothing to do. "cache": every feature is looked up in a table of its float values,
    but one that takes no weights. "auto": for each
    feature the one of the two that `choose` takes, with its disturbance measured on the feature (all keys) and on the
    network's output (`EFFECT_ROWS` rows, this feature alone being quantized). One that stays over the bound, because
    neither way or the budget allows less, is among the plan's notes.

    gm.meta["maintenance"] has the table of decisions, the bytes and the seconds per call. Raises TFMQError for "cache" where
    a feature has no finite key, naming it, and for a budget that nothing fits.
    """
    require_stage(gm, "calibrated", "reconstructed")
    recipe = gm.meta["recipe"]
    if recipe.maintain == RECONSTRUCT:
        return gm
    features, forced = gm.meta["features"], recipe.maintain == CACHE
    floats = {f: why for f in features if (why := uncacheable(gm, f)) is not None}
    if forced:
        for name in floats:
            feature_key(gm, name)  # raises
    before = _converted_block(gm)
    needs = dict(zip(features, _needs(gm, before), strict=True))
    # What takes no weights, the timestep itself say, is exact as it is, and free.
    floats |= {n: "it takes no bytes as it is" for n, tensors in needs.items() if not tensors}
    cached = {n: _cached_bytes(gm, n, recipe.cache_type) for n in features if n not in floats}
    options = _options(
        gm, calibration, reconstructed=list(needs.values()), cached=cached, seed=seed, effects=not forced
    )
    if forced:
        chosen = {n: CACHE if n in cached else RECONSTRUCT for n in features}
    else:
        chosen = choose(options, bound=recipe.maintain_bound, budget=recipe.maintain_bytes)
    decisions = _decisions(gm, options, chosen, floats, forced=forced)
    names = [n for n in features if chosen[n] == CACHE]
    cache_temporal(gm, tables=feature_tables(gm, names), cache_type=recipe.cache_type)
    after = _converted_block(gm) if names else before
    plan = gm.meta["plan"]
    notes = [
        Note(name=n, reason=f"reconstructed, not cached: {why}", coarser=False) for n, why in floats.items()
    ]
    if not forced:
        harms = {n: options[n][m].disturbance for n, m in chosen.items()}
        over = f"disturbance over maintain_bound={recipe.maintain_bound:g}"
        notes += [Note(name=n, reason=over) for n, harm in harms.items() if harm > recipe.maintain_bound]
    gm.meta["plan"] = dataclasses.replace(plan, notes=(*plan.notes, *notes))
    gm.meta["maintenance"] = {
        "bound": None if forced else recipe.maintain_bound,
        "budget": None if forced else recipe.maintain_bytes,
        "cache_type": recipe.cache_type,
        "features": [dataclasses.asdict(d) for d in decisions],
        "bytes": {
            RECONSTRUCT: total_bytes(options, dict.fromkeys(features, RECONSTRUCT)),
            # Of everything that can be.
            CACHE: total_bytes(options, {n: CACHE if n in cached else RECONSTRUCT for n in features}),
            "chosen": total_bytes(options, chosen),
        },
        "seconds_per_call": {RECONSTRUCT: _seconds(gm, before), "chosen": _seconds(gm, after)},
    }
    return gm


def choose(
    options: Mapping[str, Mapping[str, Option]], *, bound: float, budget: int | None = None
) -> dict[str, str]:
    """The maintenance of each feature; options: feature -> maintenance -> what it costs and does.

    Without a budget: the fewest bytes with every feature's disturbance within the bound; a feature of which no option
    is takes its smallest disturbance. With a budget: the smallest sum of disturbances that fits it, within the bound as
    far as that fits. Features share bytes (the time embedding is needed until the last of them is cached), so the
    search starts from both pure ends and flips one feature at a time while that helps.

    Raises TFMQError for a budget below the smallest choice, saying that one's size.
    """

    def within(limit: float) -> dict[str, dict[str, Option]]:
        kept = {f: {m: o for m, o in given.items() if o.disturbance <= limit} for f, given in options.items()}
        best = {f: min(given, key=lambda m, g=given: g[m].disturbance) for f, given in options.items()}  # type: ignore[misc]
        return {f: kept[f] or {best[f]: options[f][best[f]]} for f in options}

    allowed = within(bound)
    if budget is None:
        return _smallest(allowed)
    for allowed in (allowed, within(math.inf)):  # noqa: B020 - the second only where the first does not fit
        least = _smallest(allowed)
        if total_bytes(options, least) <= budget:
            starts = [c for c in (least, *_ends(allowed)) if total_bytes(options, c) <= budget]
            upgraded = [_improve(c, allowed, budget) for c in starts]
            return min(upgraded, key=lambda c: (total_disturbance(options, c), total_bytes(options, c)))
    raise TFMQError(
        f"maintain_bytes={budget}: the temporal features need {total_bytes(options, least)} bytes at least; "
        "raise it, or use fewer timesteps, bits or cache_type='int8'."
    )


def total_bytes(options: Mapping[str, Mapping[str, Option]], chosen: Mapping[str, str]) -> int:
    """Of all that the features need, what they share being counted once."""
    needed: dict[str, int] = {}
    for feature, maintenance in chosen.items():
        needed |= options[feature][maintenance].tensors
    return sum(needed.values())


def total_disturbance(options: Mapping[str, Mapping[str, Option]], chosen: Mapping[str, str]) -> float:
    return sum(options[f][m].disturbance for f, m in chosen.items())


def _ends(allowed: Mapping[str, Mapping[str, Option]]) -> list[dict[str, str]]:
    """All of one kind, as far as each feature may."""
    return [
        {f: m if m in given else next(iter(given)) for f, given in allowed.items()}
        for m in (RECONSTRUCT, CACHE)
    ]


def _smallest(allowed: Mapping[str, Mapping[str, Option]]) -> dict[str, str]:
    """Greedy from both ends: the fewest bytes, then the least disturbance."""

    def cost(chosen: Mapping[str, str]) -> tuple[int, float]:
        return total_bytes(allowed, chosen), total_disturbance(allowed, chosen)

    found = []
    for current in _ends(allowed):
        while flips := [c for c in _flips(current, allowed) if cost(c) < cost(current)]:
            current = min(flips, key=cost)
        found.append(current)
    return min(found, key=cost)


def _improve(
    chosen: dict[str, str], allowed: Mapping[str, Mapping[str, Option]], budget: int
) -> dict[str, str]:
    """Greedy: the flip that takes away the most disturbance per byte, while the budget allows one."""
    size, harm = total_bytes(allowed, chosen), total_disturbance(allowed, chosen)
    best, rate = None, 0.0
    for flip in _flips(chosen, allowed):
        gain, added = harm - total_disturbance(allowed, flip), total_bytes(allowed, flip) - size
        if gain > 0 and size + added <= budget and gain / max(added, 1) > rate:
            best, rate = flip, gain / max(added, 1)
    return chosen if best is None else _improve(best, allowed, budget)


def _flips(
    chosen: Mapping[str, str], allowed: Mapping[str, Mapping[str, Option]]
) -> Iterable[dict[str, str]]:
    for feature, given in allowed.items():
        for maintenance in given:
            if maintenance != chosen[feature]:
                yield {**chosen, feature: maintenance}


@torch.no_grad()
def feature_tables(gm: GraphModule, features: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The float value of temporal features of a prepared graph at every value of their key: feature -> (K, ...).

    None: every feature. Evaluated in pieces of 1024 rows; one by one where the timestep has shape (). Raises TFMQError
    for a feature without a finite key, and for a block that needs more than its keys.
    """
    names = list(gm.meta["features"] if features is None else features)
    keys = {name: feature_key(gm, name) for name in names}
    block = _float_block(gm)
    require_keys_only(gm, block)
    scalar = is_scalar(gm)
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(keys.values()):
        wanted = [n for n in names if keys[n] == key]
        pieces: dict[str, list[Tensor]] = {n: [] for n in wanted}
        for part in chunks_of(_key_rows(gm, key)):
            values = dict(zip(gm.meta["features"], run_temporal(block, part, scalar=scalar), strict=True))
            for name in wanted:
                value = values[name]
                # A scalar timestep runs row by row, and keeps the batch of one of what other inputs join.
                pieces[name].append(value[:, 0] if scalar and is_per_row(gm, key) else value)
        found |= {n: torch.cat(pieces[n]) for n in wanted}
    return found


def _key_rows(gm: GraphModule, key: tuple[str, ...]) -> dict[str, Tensor]:
    """Every value of a key, row-major, as inputs of the block; zeros for inputs that the key does not hold."""
    values, sizes = tables(gm), table_sizes(gm)
    index = torch.cartesian_prod(*[torch.arange(sizes[n]) for n in key]).reshape(-1, len(key))
    rows = {}
    for name in (gm.meta["timestep"], *gm.meta["conditioning"]):
        fake = meta_value(placeholders(gm)[name])
        if name in key:
            value = values[name][index[:, key.index(name)]]
            rows[name] = value.to(fake.dtype) if isinstance(fake, Tensor) else value
        else:
            sizes_of_one = [fixed_size(d) for d in fake.shape[1:]]
            rows[name] = torch.zeros([len(index), *sizes_of_one], dtype=fake.dtype)  # type: ignore[list-item]
    return rows


def _float_block(gm: GraphModule) -> GraphModule:
    floats = without_observers(gm)
    return extract_temporal(floats, temporal_of(floats))


def _converted_block(gm: GraphModule) -> GraphModule:
    """The temporal block alone, as `convert` would leave it."""
    block = extract_temporal(gm, temporal_of(gm))
    block.meta.update(gm.meta)  # torchao asks it for a mark that prepare set
    return to_integers(block)


def _needs(gm: GraphModule, block: GraphModule) -> list[dict[str, int]]:
    """For each feature of the converted block, the tensors that it is computed from and nothing outside reads: bytes on disk."""
    sizes, outside = stored_bytes(block), _read_outside(gm)
    outputs: Any = block.graph.output_node().args[0]
    found = []
    for node in outputs:
        read = {str(n.target) for n in ancestors([node]) if n.op == "get_attr"}
        found.append({n: sizes[n] for n in sorted(read) if _float_name(n) not in outside})
    return found


def _read_outside(gm: GraphModule) -> set[str]:
    """Constants that the graph reads besides its temporal features."""
    features = {n for n in gm.graph.nodes if n.name in gm.meta["features"]}
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
    """The weight that an integer tensor, its scale or zero point belongs to."""
    for suffix in ("_q", "_scale", "_zero_point"):
        name = name.removesuffix(suffix)
    return name


def stored_bytes(gm: GraphModule) -> dict[str, int]:
    """Bytes in the artefact of each tensor that a converted graph reads, packed where they are packed."""
    packed = packed_tensors(gm)
    return {
        name: -(-value.numel() * (packed[name][1] - packed[name][0]).bit_length() // 8)
        if name in packed
        else value.numel() * value.element_size()
        for name, value in tensors_of(gm).items()
    }


def _cached_bytes(gm: GraphModule, name: str, cache_type: str) -> dict[str, int]:
    """What a cached feature needs: its columns of the table, and the tables of its key's values, which all share."""
    key, sizes, values = feature_key(gm, name), table_sizes(gm), tables(gm)
    rows = math.prod(sizes[n] for n in key)
    fake = meta_value(next(n for n in gm.graph.nodes if n.name == name))
    width = _width(gm, name, fake, is_per_row(gm, key))
    item = {"float16": 2, "bfloat16": 2, "int8": 1}[cache_type]
    found = {f"{name}: cached": rows * (width * item + (4 if cache_type == "int8" else 0))}
    outside = _read_outside(gm)
    for n in key:
        table = TIMESTEPS if n == gm.meta["timestep"] else f"{n}_table"
        if table not in outside:
            found[table] = values[n].numel() * 8  # float64
    return found


def _width(gm: GraphModule, name: str, fake: Any, per_row: bool) -> int:
    if isinstance(fake, Tensor):
        return math.prod(int(d) for d in (fake.shape[1:] if per_row else fake.shape))
    return feature_tables(gm, [name])[name][0].numel()


def _options(
    gm: GraphModule,
    calibration: CalibrationSet,
    *,
    reconstructed: list[dict[str, int]],
    cached: Mapping[str, dict[str, int]],
    seed: int,
    effects: bool,
) -> dict[str, dict[str, Option]]:
    names, cache_type = gm.meta["features"], gm.meta["recipe"].cache_type
    blocks = (extract_temporal(gm, temporal_of(gm)), _float_block(gm))
    require_keys_only(gm, blocks[0])
    distances: dict[str, list[Tensor]] = {RECONSTRUCT: [], CACHE: []}
    for part in chunks_of(temporal_rows(gm, calibration.tensors)):
        quantized, reference = (run_temporal(b, part, scalar=is_scalar(gm)) for b in blocks)
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
    """Rows of a feature as a table would give them back."""
    return decode(*encode(x_N.float().reshape(len(x_N), -1), cache_type)).reshape(x_N.shape)


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
    """(feature, maintenance) -> sum |output - float|^2 / sum |float|^2, the rest of the network being float.

    One run of the float network on `EFFECT_ROWS` rows for each: what one feature does is linear in its error while that
    is small, and features' errors add up; the rest of the network's quantization would drown the effect of one.
    """
    network = without_observers(gm)
    partition_temporal(network, temporal=temporal_of(network))
    changed = _Changed(network.get_submodule(BLOCK_NAME))
    block = changed.block
    network.set_submodule(BLOCK_NAME, changed)
    cached, cache_type = set(cached), gm.meta["recipe"].cache_type
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


def _seconds(gm: GraphModule, block: GraphModule, *, runs: int = 21) -> float:
    """The block for one sample, in eager mode: the least of some runs, which other work on the machine disturbs least."""
    key = (gm.meta["timestep"],)
    rows = {n: x[:1] for n, x in _key_rows(gm, key).items()}
    inputs = [rows[n] for n in placeholders(block)]
    if is_scalar(gm):
        inputs = [
            x[0] if meta_value(placeholders(gm)[n]).dim() == 0 else x
            for n, x in zip(placeholders(block), inputs, strict=True)
        ]
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        block(*inputs)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _decisions(
    gm: GraphModule,
    options: Mapping[str, Mapping[str, Option]],
    chosen: Mapping[str, str],
    floats: Mapping[str, str],
    *,
    forced: bool,
) -> list[Decision]:
    recipe, paths = gm.meta["recipe"], _paths(gm)
    users: dict[str, set[str]] = {}  # tensor -> the features that may need it
    for feature, given in options.items():
        for option in given.values():
            for tensor in option.tensors:
                users.setdefault(tensor, set()).add(feature)
    found = []
    for name, given in options.items():
        own = {m: sum(b for t, b in o.tensors.items() if len(users[t]) == 1) for m, o in given.items()}
        found.append(
            Decision(
                feature=name,
                path=paths.get(name, name),
                key=() if name in floats else feature_key(gm, name),
                bytes=own,
                disturbance={m: o.distance for m, o in given.items()},
                effect={m: o.effect for m, o in given.items() if o.effect is not None},
                chosen=chosen[name],
                why=floats[name]
                if name in floats
                else "Recipe.maintain is cache"
                if forced
                else _why(given, own, chosen[name], recipe.maintain_bound),
            )
        )
    return found


def _why(given: Mapping[str, Option], own: Mapping[str, int], chosen: str, bound: float) -> str:
    (other,) = (m for m in given if m != chosen)
    mine, theirs = given[chosen].disturbance, given[other].disturbance
    if mine > bound:
        return f"disturbance {mine:.1e}, over the bound {bound:.1e}; {other}: {theirs:.1e}"
    if theirs > bound:
        return f"{other}: disturbance {theirs:.1e}, over the bound {bound:.1e}"
    if own[chosen] <= own[other]:
        return f"{own[chosen]} bytes of its own, {other}: {own[other]}"
    if mine < theirs:
        return f"disturbance {mine:.1e}, {other}: {theirs:.1e}; with the others cached what they share goes, or the budget allows it"
    return f"{own[chosen]} bytes of its own, {other}: {own[other]}; what the features share makes it smaller in all"


def _paths(gm: GraphModule) -> dict[str, str]:
    """Feature -> the weight of its layer."""
    return {layer.node: layer.path for layer in gm.meta["plan"].layers}
