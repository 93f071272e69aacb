"""Choose the settings that a recipe leaves open, layer by layer, by what they do to the network's output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.arithmetic import (
    FLOAT8,
    FLOAT_BITS,
    activation_numbers,
    choose_qparams,
    choose_shared_qparams,
)
from tfmq_fx.base.errors import first_of
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.effects import (
    ROWS,
    Effects,
    Ranges,
    Reader,
    input_ranges,
    largest,
    output_effects,
)
from tfmq_fx.graph.channels import ParameterLayer, channel_axis, choose_layers
from tfmq_fx.graph.inputs import fixed_batch
from tfmq_fx.graph.nodes import attribute, edge_layers
from tfmq_fx.graph.origins import Explicit, Origin, find_origins
from tfmq_fx.passes.low_bits.smooth import readers_of, smoothing_scale
from tfmq_fx.passes.quantize.plan import LayerPlan, plan, settings_of
from tfmq_fx.passes.quantize.two_terms import can_have_two
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock
from tfmq_fx.recipe import AUTO, OFF, SHARES, Recipe, Rule
from tfmq_fx.reconstruction.stage import temporal_method
from tfmq_fx.runtimes.layers import layers_of

ALPHAS = (0.35, 0.5, 0.65, 0.8, 0.95)
# What costs something at run time (a multiplication, a table, bytes) must save this share of the output's error.
WORTH = 1e-3
# What each method leaves of the squared error of rounding a weight to nearest, about
# (docs/measured/reconstruction.md).
LEFT = {"nearest": 1.0, "gptq": 0.25, "adaround": 0.15, "gptq+adaround": 0.15}
FLOAT_BYTES = 4  # of a weight left in float
TERM_STEPS = 255  # of 8 bits: the second term of an activation has as many in one of the first
ROUNDS = 3  # the weights of the timesteps depend on the choice, and the choice on them

Smoothing = Mapping[Any, Tensor | None]
# Reader's input -> smoothing -> (scale (P,), zero_point (P,))
QParams = dict[tuple[str, int], dict[Any, tuple[Tensor, Tensor]]]
Scales = dict[tuple[str, int], dict[Any, Tensor]]  # the same, (1,)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A recipe with nothing left open, and how it was found."""

    recipe: Recipe
    report: dict[str, Any]  # plain JSON values; {} if nothing was open
    maxima: Mapping[str, Tensor] | None = None  # for `smooth`, measured on the way
    note: str = ""  # what was not chosen, and why


def is_open(recipe: Recipe) -> bool:
    """Return True if `choose` has something to choose."""
    return AUTO in (recipe.smooth, recipe.keyed) or any(getattr(recipe, name) for name in SHARES)


@neutral()
def choose(
    gm: GraphModule,
    recipe: Recipe,
    calibration: CalibrationSet,
    *,
    temporal: TemporalBlock,
    timesteps: Tensor | None = None,
    seed: int = 0,
) -> Choices:
    """Choose what the recipe leaves open, so that the error of the network's output is least.

    For each layer: the exponent of smoothing (Recipe.smooth "auto"), and whether its input has qparams per timestep
    (Recipe.keyed "auto"). Within Recipe.float_flops and Recipe.float_bytes: the inputs that stay in float, and the weights
    that get 8 or 16 bits. Errors are estimated by `output_effects` on a few rows of the calibration set, relative to the
    whole error at their timestep, so that no timestep counts for more than another. The rounding of a first or last layer's
    weights counts once for every timestep: it does the same to the same picture at each of them, so that it adds up.

    gm: a captured float graph, which is left unchanged. timesteps: the schedule (T,); None takes that of the calibration set. If some
    of it have no rows, nothing gets qparams per timestep. seed: of the choice of rows and of the estimates.
    """
    if not is_open(recipe):
        return Choices(recipe=recipe, report={})
    missing = calibration.lacks(timesteps) if recipe.keyed == AUTO and timesteps is not None else []
    why = f"no scales per timestep were considered: no row has the schedule's {first_of(missing)}"
    if recipe.keyed == AUTO and (missing or calibration.tensors[calibration.timestep].dim() > 1):
        recipe = dataclasses.replace(recipe, keyed="block")  # a sample with several timesteps has no key
    planned = plan(gm, recipe=recipe, temporal=temporal).layers
    nodes = {n.name: n for n in gm.graph.nodes}
    only_size = fixed_batch(gm, calibration.without_rows)
    rows = _rows(calibration, only_size or 1, seed)
    at = calibration.row_timesteps[torch.stack([r[0] for r in rows])]
    timesteps, where_P = at.unique(return_inverse=True)
    axes = {p.node: channel_axis(nodes[p.node], attribute(gm, p.path)) for p in planned}
    ranges = input_ranges(gm, calibration, axes, timesteps, only_size=only_size, seed=seed)
    maxima = largest(ranges)
    readers = _readers(gm, recipe, planned, ranges, temporal)
    by_timestep, static = _qparams(recipe, readers, ranges, where_P)
    effects = output_effects(
        gm,
        calibration,
        readers,
        by_timestep,
        rows,
        shards=recipe.reconstruction.shards,
        seed=seed,
    )
    flops = {layer.node: layer.flops for layer in layers_of(gm)}
    edges = {n.name for n in edge_layers(gm, timestep=temporal.timestep)} - set(temporal.nodes)
    steps = len(calibration.row_timesteps.unique())
    repeats = dict.fromkeys(edges, steps)
    search = _Search(recipe, readers, effects, by_timestep, static, flops=flops, repeats=repeats)
    before = search.error_P()
    search.run()
    chosen = dataclasses.replace(
        recipe,
        smooth=None if recipe.smooth == AUTO else recipe.smooth,
        keyed="block" if recipe.keyed == AUTO else recipe.keyed,
        float_flops=0.0,  # spent
        double_flops=0.0,
        float_bytes=0.0,
        chosen=tuple(search.rules()),
    )
    report = {**search.report(before), "constant_inputs": _constant(planned, ranges)}
    return Choices(recipe=chosen, report=report, maxima=maxima, note=why if missing else "")


def _constant(planned: Sequence[LayerPlan], ranges: Mapping[str, Ranges]) -> list[str]:
    """Return the layers whose input is the same in all rows, in every channel."""
    # A timestep that no row has is +-inf.
    values = ((p.path, ranges[p.node]) for p in planned)
    return [path for path, of in values if bool((of.low_TC.amin(0) == of.high_TC.amax(0)).all())]


def _rows(calibration: CalibrationSet, count: int, seed: int) -> list[Tensor]:
    """Return the indices of the rows of each run: `count` of one timestep and size."""
    t, sizes, found = calibration.row_timesteps, calibration.row_sizes, []
    for row in calibration.draw(ROWS, seed=seed):
        alike = t == t[row]
        if sizes is not None:
            alike &= sizes.kinds == sizes.kinds[row]
        same = alike.nonzero().flatten()
        found.append(torch.cat([row[None], same[same != row]]).repeat(count)[:count])
    return found


def _readers(
    gm: GraphModule,
    recipe: Recipe,
    planned: Sequence[LayerPlan],
    ranges: Mapping[str, Ranges],
    temporal: TemporalBlock,
) -> list[Reader]:
    """Return every layer to be quantized, with its candidates."""
    nodes = {n.name: n for n in gm.graph.nodes}
    layers, _ = choose_layers(gm, temporal.nodes, timestep=temporal.timestep)
    by_node = {layer.node.name: layer for layer in layers}
    smoothing = _smoothing(gm, recipe, planned, layers, ranges, temporal)
    found = []
    for i, p in enumerate(planned):
        if min(p.weight_bits, p.activation_bits) == FLOAT_BITS:
            continue
        group, candidates, clipping = smoothing.get(p.node, (-1 - i, {OFF: None}, {}))
        wider = recipe.float_bytes > 0 and p.weight_bits < 8 and not _given(recipe, p).weight_bits
        found.append(
            Reader(
                plan=p,
                node=nodes[p.node],
                layer=by_node.get(p.node),
                group=group,
                smoothing=candidates,
                clipping=clipping,
                weight_bits=() if p.weight_bits == FLOAT_BITS else (p.weight_bits, *([8] if wider else [])),
            )
        )
    return found


def _given(recipe: Recipe, layer: LayerPlan) -> Rule:
    return settings_of(recipe, layer.path, layer.op)


def _smoothing(
    gm: GraphModule,
    recipe: Recipe,
    planned: Sequence[LayerPlan],
    layers: Sequence[ParameterLayer],
    ranges: Mapping[str, Ranges],
    temporal: TemporalBlock,
) -> dict[str, tuple[int, Smoothing, dict[Any, Tensor]]]:
    """Return layer's node name -> (the number of its group, its candidates, `Reader.clipping`), for the layers that `smooth` works on."""
    by_path = {p.path: p for p in planned}
    found: dict[str, tuple[int, Smoothing, dict[Any, Tensor]]] = {}
    maxima, seconds = largest(ranges), {name: of.second_C for name, of in ranges.items()}
    origins, explicit = find_origins(gm, layers, temporal=temporal.nodes)
    groups: list[Origin | Explicit] = [*origins, *explicit]
    for number, group in enumerate(groups):
        readers = readers_of(group, layers)
        # `smooth` takes the setting of a group's first layer too.
        given = _given(recipe, by_path[readers[0][0].path]).smooth
        given = recipe.smooth if given is None else given
        alphas = ALPHAS if given == AUTO else [a for a in (given,) if isinstance(a, float)]
        count = 1 + max(int(numbers.max()) for _, numbers in readers)
        scales, without = (
            {a: smoothing_scale(readers, x, count, a).float() for a in alphas} for x in (maxima, seconds)
        )
        off: Smoothing = {OFF: None} if given in (AUTO, OFF, None) else {}
        for layer, numbers in readers:
            of = ranges[layer.node.name]
            clipping = {a: of.clipped(s_C[numbers], without[a][numbers]) for a, s_C in scales.items()}
            smoothing = {**off, **{a: s_C[numbers] for a, s_C in scales.items()}}
            found[layer.node.name] = number, smoothing, clipping
    return found


@dataclass(frozen=True)
class _Step:
    """More precision for one tensor."""

    saved_P: Tensor  # error of the output
    costs: Mapping[str, float]  # the recipe's field -> the share of it that is spent
    take: Callable[[], None]


def _qparams(
    recipe: Recipe,
    readers: Sequence[Reader],
    ranges: Mapping[str, Ranges],
    where_P: Tensor,
) -> tuple[QParams, Scales]:
    """Return every smoothed input's qparams in each of the P rows, and the scale of one set for all.

    where_P: the index of each row's timestep in `ranges`.
    """
    by_timestep: QParams = {}
    static: Scales = {}
    for r in readers:
        if r.plan.activation_bits == FLOAT_BITS or r.input in by_timestep:
            continue
        numbers = activation_numbers(r.plan.activation_bits, r.plan.dtype)
        shared = recipe.shared_zero_point and not r.plan.temporal
        choose_own = choose_shared_qparams if shared else choose_qparams
        by_timestep[r.input], static[r.input] = {}, {}
        for candidate, s_C in r.smoothing.items():
            of = ranges[r.node.name]
            low_TC, high_TC = (x if s_C is None else x / s_C.to(x) for x in (of.low_TC, of.high_TC))
            low_T, high_T = low_TC.amin(1), high_TC.amax(1)
            seen_T = low_T <= high_T  # False: all rows have one of these timesteps
            low_T, high_T = low_T.where(seen_T, 0), high_T.where(seen_T, 0)
            scale_T, zero_T = choose_own(low_T, high_T, numbers)
            static[r.input][candidate], _ = choose_qparams(low_T.amin()[None], high_T.amax()[None], numbers)
            if r.plan.dtype == FLOAT8:  # its error is relative: a scale of a timestep's own saves nothing
                scale_T = static[r.input][candidate].expand_as(scale_T)
            by_timestep[r.input][candidate] = scale_T[where_P], zero_T[where_P]
    return by_timestep, static


def _together(readers: Iterable[Reader]) -> list[list[Reader]]:
    """Return the layers, those together that read one input or one weight: they have the same settings for inputs."""
    groups: list[tuple[set[Any], list[Reader]]] = []
    for r in readers:
        names: set[Any] = {r.input, r.plan.path}
        joined = [g for g in groups if g[0] & names]
        groups = [g for g in groups if not g[0] & names]
        groups.append((names.union(*(n for n, _ in joined)), [*(x for _, of in joined for x in of), r]))
    return [of for _, of in groups]


def _inputs(readers: Iterable[Reader]) -> list[tuple[str, int]]:
    return list(dict.fromkeys(r.input for r in readers))


class _Search:
    """A choice for every layer, and what it leaves of the output's error by row (P,)."""

    def __init__(
        self,
        recipe: Recipe,
        readers: Sequence[Reader],
        effects: Effects,
        by_timestep: QParams,
        static: Scales,
        *,
        flops: Mapping[str, int],
        repeats: Mapping[str, int],
    ) -> None:
        """flops: of each layer, by node. repeats: how often the error of a node's weight counts; absent: once."""
        self.recipe, self.readers, self.effects, self.flops = recipe, readers, effects, flops
        self.repeats = repeats
        self.rule = {r.plan.path: _given(recipe, r.plan) for r in readers}
        self.alpha = {r.group: next(iter(r.smoothing)) for r in readers}
        self.bits = {r.plan.path: r.plan.weight_bits for r in readers}
        self.of_weight: dict[str, list[Reader]] = {}
        for r in readers:
            self.of_weight.setdefault(r.plan.path, []).append(r)
        self.owners = [of[-1] for of in self.of_weight.values()]  # one for each weight
        self.together = _together(r for r in readers if r.input in effects.inputs)
        # Input -> smoothing -> the error with qparams of the row's timestep, and with one set for all.
        self.rounding: dict[tuple[str, int], dict[Any, tuple[Tensor, Tensor]]] = {}
        self.clipping: dict[tuple[str, int], dict[Any, Tensor]] = {}  # the error of what other rows clip
        for r in readers:
            if r.input in effects.inputs:
                energy_PC = effects.inputs[r.input]
                self.clipping[r.input] = {
                    c: (energy_PC * clipped_C.cpu()).sum(1) for c, clipped_C in r.clipping.items()
                }
                self.rounding[r.input] = {
                    c: self._rounding(r, c, by_timestep[r.input][c][0], static[r.input][c])
                    for c in r.smoothing
                }
        self.wide: set[tuple[str, int]] = set()  # inputs that stay in float
        self.double: set[tuple[str, int]] = set()  # inputs in two terms
        self.bytes = sum(self._bytes(r, r.plan.weight_bits) for r in self.owners)
        self.keyed = {r.input for r in readers if r.input in self.rounding and self._may_key(r)}

    def _may_key(self, reader: Reader) -> bool | None:
        """Return whether an input has qparams per timestep, by rule or by the recipe; None if that is open."""
        given = self.rule[reader.plan.path].keyed or self.recipe.keyed
        if reader.plan.temporal or reader.plan.activation_granularity == "token":
            return True
        return None if given == AUTO else given == "all"

    def run(self) -> None:
        for _ in range(ROUNDS):
            weights_P = 1 / self.error_P().clamp_min(1e-30)
            self._smooth(weights_P)
            self._key(weights_P)
        while self._widen(1 / self.error_P().clamp_min(1e-30)):
            pass
        # What is in float now no longer asks for even activations.
        self._smooth(1 / self.error_P().clamp_min(1e-30))

    # ---- errors

    def error_P(self) -> Tensor:
        errors = [self._input_error(key) for key in self.rounding]
        errors += [self._weight_error(r) for r in self.owners]
        return torch.stack(errors).sum(0)

    def _input_error(self, key: tuple[str, int], alpha: Any = None, *, keyed: bool | None = None) -> Tensor:
        alpha = self.alpha[key[1]] if alpha is None else alpha
        if key in self.wide:
            return torch.zeros_like(self.effects.power)
        by_timestep_P, static_P = self.rounding[key][alpha]
        if key in self.double:
            return self._two_terms_error(key, alpha)
        rounding_P = by_timestep_P if (key in self.keyed if keyed is None else keyed) else static_P
        return rounding_P + self.clipping[key].get(alpha, 0.0)

    def _two_terms_error(self, key: tuple[str, int], alpha: Any = None) -> Tensor:
        """Return what two terms leave of an input's error. They have one set of qparams."""
        alpha = self.alpha[key[1]] if alpha is None else alpha
        _, static_P = self.rounding[key][alpha]
        return static_P / TERM_STEPS**2 + self.clipping[key].get(alpha, 0.0)

    def _rounding(
        self, reader: Reader, alpha: Any, step_P: Tensor, static_1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the error (P,) of rounding a smoothed input with qparams of the row's timestep, and with one set."""
        energy_PC, s_C = self.effects.inputs[reader.input], reader.smoothing[alpha]
        error_P = (energy_PC if s_C is None else energy_PC * s_C.double().square()).sum(1) / 12
        error_P = error_P * self.effects.correlated[reader.input][alpha]
        return error_P * step_P.cpu().double().square(), error_P * static_1.cpu().double().square()

    def _weight_error(self, reader: Reader, alpha: Any = None, bits: int | None = None) -> Tensor:
        alpha = self.alpha[reader.group] if alpha is None else alpha
        bits = bits or self.bits[reader.plan.path]
        if bits == FLOAT_BITS:
            return torch.zeros_like(self.effects.power)
        settings = self.recipe.reconstruction
        method = temporal_method(settings) if reader.plan.temporal else settings.method
        return self.effects.weights[reader.plan.path][alpha, bits] * LEFT[method]

    def _share(self, error_P: Tensor, weights_P: Tensor) -> float:
        """Return the share of an error in the whole, the mean over the rows."""
        return float((error_P * weights_P).mean())

    # ---- choices

    def _smooth(self, weights_P: Tensor) -> None:
        groups: dict[int, list[Reader]] = {}
        for r in self.readers:
            groups.setdefault(r.group, []).append(r)
        for group, readers in groups.items():
            keys = [k for k in _inputs(readers) if k in self.rounding]
            shares = {}
            for alpha in readers[0].smoothing:
                errors = [self._input_error(k, alpha) for k in keys]
                errors += [self._weight_error(r, alpha) for r in readers]
                shares[alpha] = self._share(torch.stack(errors).sum(0), weights_P)
            best = min(shares, key=lambda a: shares[a])
            needless = OFF in shares and shares[OFF] - shares[best] < WORTH / len(groups)
            self.alpha[group] = OFF if needless else best

    def _key(self, weights_P: Tensor) -> None:
        for readers in self.together:
            keys = _inputs(r for r in readers if self._may_key(r) is None)
            gains = [self._input_error(k, keyed=False) - self._input_error(k, keyed=True) for k in keys]
            worth = bool(gains) and self._share(torch.stack(gains).sum(0), weights_P) > WORTH
            (self.keyed.update if worth else self.keyed.difference_update)(keys)

    def _widen(self, weights_P: Tensor) -> bool:
        """Take the step that saves most error for its share of the budgets; return False if none is worth it."""
        room = self.room()
        best: tuple[float, _Step] | None = None
        for step in self._steps():
            gain = self._share(step.saved_P, weights_P)
            # A budget may be overspent already, by rules: what costs nothing of it is taken all the same.
            costs = {name: cost for name, cost in step.costs.items() if cost}
            if gain >= WORTH and all(cost <= room[name] for name, cost in costs.items()):
                cost = sum(cost / getattr(self.recipe, name) for name, cost in costs.items())
                worth = gain / cost if cost else math.inf
                if best is None or worth > best[0]:
                    best = worth, step
        if best is not None:
            best[1].take()
        return best is not None

    def _steps(self) -> Iterator[_Step]:
        for readers in self.together:
            rules, keys = [self.rule[r.plan.path] for r in readers], _inputs(readers)
            if not (self.wide | self.double).intersection(keys) and not any(
                r.activation_bits or r.activation_terms for r in rules
            ):
                saved_P = torch.stack([self._input_error(key) for key in keys]).sum(0)
                yield _Step(
                    saved_P,
                    {"float_flops": self._flops(r for r in readers if not self._is_float(r))},
                    partial(self.wide.update, keys),
                )
                if all(
                    can_have_two(r.node) and not r.plan.temporal and r.plan.dtype != FLOAT8 for r in readers
                ):
                    left_P = torch.stack([self._two_terms_error(key) for key in keys]).sum(0)
                    yield _Step(
                        saved_P - left_P,
                        {"double_flops": self._flops(readers)},
                        partial(self.double.update, keys),
                    )
        for r in self.owners:
            now = self.bits[r.plan.path]
            for bits in (8, FLOAT_BITS) if not self.rule[r.plan.path].weight_bits else ():
                if bits > now and (bits == FLOAT_BITS or bits in r.weight_bits):
                    costs = {"float_bytes": (self._bytes(r, bits) - self._bytes(r, now)) / self.bytes}
                    if bits == FLOAT_BITS:
                        same = self.of_weight[r.plan.path]
                        costs["float_flops"] = self._flops(x for x in same if not self._is_float(x))
                    saved_P = self._weight_error(r) - self._weight_error(r, bits=bits)
                    saved_P = saved_P * self.repeats.get(r.node.name, 1)
                    yield _Step(saved_P, costs, partial(self.bits.__setitem__, r.plan.path, bits))

    def room(self) -> dict[str, float]:
        """Return what is left of each budget."""
        spent = {
            "float_flops": self.float_flops(),
            "double_flops": self.double_flops(),
            "float_bytes": sum(self._bytes(r, self.bits[r.plan.path]) for r in self.owners) / self.bytes - 1,
        }
        return {name: getattr(self.recipe, name) - share for name, share in spent.items()}

    def _flops(self, readers: Iterable[Reader]) -> float:
        """Return these layers' share of all multiplications."""
        return sum(self.flops[r.node.name] for r in readers) / sum(self.flops.values())

    def _is_float(self, r: Reader) -> bool:
        """Return True if the layer's multiplications are in float."""
        return (
            r.input in self.wide
            or r.plan.activation_bits == FLOAT_BITS
            or self.bits[r.plan.path] == FLOAT_BITS
        )

    def _bytes(self, r: Reader, bits: int) -> int:
        weights = r.weight_value.numel()
        return weights * FLOAT_BYTES if bits == FLOAT_BITS else weights * bits // 8

    def float_flops(self) -> float:
        """Return the share of all multiplications that are in float."""
        return self._flops(r for r in self.readers if self._is_float(r))

    def double_flops(self) -> float:
        """Return the share of all multiplications that are done twice."""
        return self._flops(r for r in self.readers if r.input in self.double)

    # ---- results

    def rules(self) -> Iterator[Rule]:
        """Yield a rule for every layer whose settings differ from the recipe's."""
        keyed = self.keyed - self.wide - self.double
        for r in self.owners:
            path, given = r.plan.path, self.rule[r.plan.path]
            alpha = self.alpha[r.group]
            own = any(x.input in keyed and self._may_key(x) is None for x in self.of_weight[path])
            rule = Rule(
                pattern=path,
                smooth=alpha if len(r.smoothing) > 1 and alpha != OFF else given.smooth,
                keyed="all" if own else given.keyed,
                activation_terms=2 if r.input in self.double else given.activation_terms,
                activation_bits=FLOAT_BITS if r.input in self.wide else given.activation_bits,
                weight_bits=self.bits[path] if self.bits[path] != r.plan.weight_bits else given.weight_bits,
            )
            if rule != Rule(pattern=path):
                yield rule

    def report(self, before_P: Tensor) -> dict[str, Any]:
        """Return the choice as plain JSON values: by timestep, and layer by layer."""
        after_P = self.error_P()
        weights_P = 1 / after_P.clamp_min(1e-30)
        layers: dict[str, dict[str, Any]] = {
            r.plan.path: {
                "name": r.plan.path,
                "input": 0.0,
                "weight": self._share(self._weight_error(r), weights_P),
            }
            for r in self.owners
        }
        # The error of an input is listed with the first layer that reads it.
        first = {r.input: r.plan.path for r in reversed(self.readers) if r.input in self.rounding}
        for key, path in first.items():
            layers[path]["input"] += self._share(self._input_error(key), weights_P)
        for rule in self.rules():
            settings = {n: v for n, v in dataclasses.asdict(rule).items() if v is not None and n != "pattern"}
            layers[rule.pattern] |= settings
        by_row = zip(
            self.effects.timesteps.tolist(),
            before_P / self.effects.power,
            after_P / self.effects.power,
            strict=True,
        )
        return {
            "rows": len(before_P),
            "gain_db": float((10 * (before_P / after_P).log10()).mean()),
            "float_flops": self.float_flops(),
            "double_flops": self.double_flops(),
            "output_relative_mse": [
                {"timestep": t, "before": float(b), "after": float(a)} for t, b, a in by_row
            ],
            "layers": sorted(layers.values(), key=lambda x: -(x["input"] + x["weight"])),
        }
