"""Observe calibration data with a prepared graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tfmq_fx.base._torchao import FakeQuantizeBase, ObserverBase
from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.errors import TFMQError, first_of, nearest_names, require_type
from tfmq_fx.base.metrics import first_tensor
from tfmq_fx.base.parallel import Ranks, Workers, workers
from tfmq_fx.base.progress import track
from tfmq_fx.calibration.calls import overflow_words
from tfmq_fx.calibration.data import CalibrationSet, inputs_of
from tfmq_fx.calibration.effects import input_ranges, largest
from tfmq_fx.calibration.temporal_rows import (
    chunks_of,
    inputs_are_keys,
    is_scalar,
    run_temporal,
    temporal_rows,
)
from tfmq_fx.graph.channels import choose_layers
from tfmq_fx.graph.inputs import rows_at_once, timestep_input
from tfmq_fx.graph.nodes import dtype_of, fresh
from tfmq_fx.graph.state import set_state
from tfmq_fx.graph.written import keeps_buffers
from tfmq_fx.observers.residual import ResidualFakeQuantize
from tfmq_fx.observers.static import StaticFakeQuantize
from tfmq_fx.observers.temporal import TemporalObserver
from tfmq_fx.observers.token import TokenFakeQuantize
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.quantize.observed import observers, set_mode
from tfmq_fx.passes.quantize.plan import Note
from tfmq_fx.passes.quantize.state import require_stage, state_of, temporal_of
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal


@declare(needs=("prepare",))
@neutral()
@keeps_buffers
@torch.no_grad()
def calibrate(
    gm: GraphModule,
    calibration: CalibrationSet,
    *,
    batch_size: int = 64,
    outputs: dict[int, Tensor | None] | None = None,
) -> GraphModule:
    """Observe the calibration data with a prepared graph, in place. Afterwards the graph fake-quantizes.

    The temporal block depends only on the timestep, and perhaps on conditioning. It is observed once, on the rows of
    `temporal_rows` (finite set calibration; it needs no data if its inputs are finite). The rest of the graph is
    observed on the calibration set.

    outputs: gets what the float network makes of the rows whose indices are its keys, the first tensor of its output, where the
        graph runs on them anyway.

    Raises TFMQError for timesteps and values of finite inputs that are in the data but not in the tables, for timesteps of the
    schedule that no row has where activations outside the temporal block have scales per timestep, and for missing and empty inputs.
    """
    state = require_stage(gm, "prepared")
    require_set(calibration)
    require_known(state.tables, calibration)
    found, shards = list(observers(gm)), state.recipe.reconstruction.shards
    block = extract_temporal(gm, temporal_of(gm))
    with workers(shards) as threads, _refusing_overflow(found):
        if inputs_are_keys(gm, block):
            for rows in chunks_of(temporal_rows(gm, calibration.tensors)):
                run_temporal(block, rows, scalar=is_scalar(gm))
            for _, observer in observers(block):
                set_mode(observer, observe=False, quantize=False)
        if any(isinstance(m, TemporalObserver) for m in _learning(gm)):
            require_rows(state.timesteps, calibration)
        if any(_observing(m) for m in gm.modules()):
            size = rows_at_once(gm, batch_size, calibration.without_rows)
            batches = calibration.groups(size, one_timestep=is_scalar(gm))
            _observe(gm, calibration, batches, shards, threads, {} if outputs is None else outputs)
        _require_observed(gm, found)
        for _, observer in found:
            observer.freeze()
    state = state.with_notes(*_notes(gm, calibration))
    set_state(gm, dataclasses.replace(state, stage="calibrated"))
    return gm


def _require_observed(gm: GraphModule, found: Sequence[tuple[Node, nn.Module]]) -> None:
    """Raise TFMQError, naming the layer, for an input that no call gave a value: there were no tokens of its kind."""
    paths = {layer.node: layer.path for layer in state_of(gm).plan.layers}
    for node, observer in found:
        if (
            isinstance(observer, StaticFakeQuantize)
            and observer.observer_enabled[0]
            and not observer.observed
        ):
            path = next((paths[u.name] for u in node.users if u.name in paths), node.name)
            raise TFMQError(
                f"calibration: the input of {path} is empty in all calibration data; give data in which it has values, or leave it in "
                f"float: rules=(Rule(pattern={path!r}, activation_bits=16),)."
            )


def _notes(gm: GraphModule, calibration: CalibrationSet) -> Iterator[Note]:
    """Yield notes on calibration data that say less than they seem to: one timestep, and inputs that never change."""
    if len(t := calibration.timesteps) == 1:
        reason = f"all rows have the timestep {t.item():g}: the ranges of activations are those of this one"
        yield Note(name="calibration", reason=reason, coarser=False)
    paths = {layer.node: layer.path for layer in state_of(gm).plan.layers}
    for node, observer in observers(gm):
        if isinstance(observer, PerChannelWeightFakeQuantize):
            continue
        kept = getattr(observer, "activation_post_process", observer)
        low, high = getattr(kept, "min_val", None), getattr(kept, "max_val", None)
        if low is not None and high is not None and low.numel() and low.amin() == high.amax():
            reason = f"its input is {low.amin().item():g} in all calibration data: no other value has a range"
            for name in (paths.get(user.name, user.name) for user in node.users):
                yield Note(name=name, reason=reason, coarser=False)


def _observe(
    gm: GraphModule,
    calibration: CalibrationSet,
    batches: list[Tensor],
    shards: int,
    threads: Workers,
    outputs: dict[int, Tensor | None],
) -> None:
    """Observe these batches of rows on threads and processes, each with its own copies of the observers; merge these.

    If an observer cannot be merged, every process observes all batches instead.

    outputs: see `calibrate`. Of several processes none gets any, so that all know the same.
    """
    ranks = Ranks()
    shards = -(-shards // ranks.size) * ranks.size
    learning = _learning(gm)
    wanted = outputs.keys() if ranks.size == 1 else set[int]()

    def run_rows(graph: GraphModule, rows: Tensor) -> None:
        x = first_tensor(graph(*inputs_of(gm, calibration.batch(rows))))
        if wanted and x.dim() and not len(x) % len(rows):
            parts = x.split(len(x) // len(rows))  # of a video, each frame may be a row
            found = zip(rows.tolist(), parts, strict=True)
            outputs.update({i: part.clone() for i, part in found if i in wanted})

    if not all(_mergeable(m) for m in learning):
        for batch in track(batches, "calibrating"):  # every process sees all the data
            run_rows(gm, batch)
        return
    pieces = [p for p in ranks.share([batches[i::shards] for i in range(shards)]) if p]
    copies = [with_own(gm, learning) for _ in pieces]

    def run(k: int, i: int) -> None:
        if i < len(pieces[k]):
            run_rows(copies[k][0], pieces[k][i])

    for i in track(range(len(pieces[0]) if pieces else 0), "calibrating"):
        threads.map(partial(run, i=i), range(len(pieces)))
    found = ranks.gather([own for _, own in copies])
    for i in range(shards // ranks.size):  # in the order of the pieces, so that the result is deterministic
        for of_rank in found:
            for observer, other in zip(learning, of_rank[i] if i < len(of_rank) else [], strict=False):
                observer.merge(other)


@contextmanager
def _refusing_overflow(found: Sequence[tuple[Node, nn.Module]]) -> Iterator[None]:
    """Raise TFMQError, naming the value and who reads it, when an activation in half precision is NaN or infinite."""
    handles = []
    for node, observer in found:
        (x, *_), dtype = node.args, dtype_of(node.all_input_nodes[0])
        if dtype != torch.float32 and not isinstance(observer, PerChannelWeightFakeQuantize):
            readers = ", ".join(u.name for u in node.users)
            words = overflow_words(f"node {x}, which {readers} reads,", dtype, "a batch")
            handles.append(observer.register_forward_pre_hook(partial(_require_finite, words)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_finite(words: str, _observer: nn.Module, given: tuple[Any, ...]) -> None:
    if not given[0].isfinite().all():
        raise TFMQError(words)


def _learning(gm: GraphModule) -> list[Any]:
    """Return the outermost modules that observe data."""
    found: dict[str, nn.Module] = {}
    for name, module in gm.named_modules():
        if _observing(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def with_own(gm: GraphModule, modules: list[nn.Module]) -> tuple[GraphModule, list[nn.Module]]:
    """Return a copy of the graph with copies of these modules, and these copies. Everything else is shared."""
    copy, own = fresh(gm), {id(m): deepcopy(m) for m in modules}
    for name, module in list(copy.named_modules(remove_duplicate=False)):
        if id(module) in own:
            copy.set_submodule(name, own[id(module)])
    return copy, [own[id(m)] for m in modules]


def _mergeable(module: nn.Module) -> bool:
    if isinstance(module, TemporalObserver):
        return type(module).merge is not TemporalObserver.merge
    return isinstance(module, (StaticFakeQuantize, ResidualFakeQuantize))


def input_maxima(
    gm: GraphModule,
    calibration: CalibrationSet,
    *,
    num_samples: int = 1024,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return node name -> max |X_j| of each input channel j (C_in,), for the layers that `smooth` works on.

    gm: a float graph.
    num_samples: rows of the calibration data, spread evenly over the timesteps, that the graph runs on once.
    """
    timestep = str(timestep_input(gm, None).target)
    axes = {layer.node.name: layer.axis for layer in choose_layers(gm, (), timestep=timestep)[0]}
    none = calibration.row_timesteps[:0]  # no timestep is kept apart
    return largest(
        input_ranges(gm, calibration, axes, none, num_samples=num_samples, batch_size=batch_size, seed=seed)
    )


def _observing(module: nn.Module) -> bool:
    """Return True if the module observes the data that it sees.

    Other quantizers' observers do. The fake quantizers of weights and tokens do not.
    """
    if isinstance(module, (PerChannelWeightFakeQuantize, TokenFakeQuantize)):
        return False
    if isinstance(module, FakeQuantizeBase):
        return bool(module.observer_enabled[0])
    return isinstance(module, ObserverBase)


def require_set(calibration: CalibrationSet) -> None:
    """Raise TFMQError for anything else than a calibration set, saying how to make one."""
    require_type(
        calibration, CalibrationSet, "calibration", "use CalibrationSet.from_tensors({name: tensor, ..})"
    )


def require_known(tables: Mapping[str, Tensor], calibration: CalibrationSet) -> None:
    """Raise TFMQError if the data have a value of a finite input that is not in its table (T, ...), or no such input.

    tables: by the name of the input, the timestep's first.
    """
    for i, (name, values) in enumerate(tables.items()):
        if name not in calibration.tensors:
            what = f"finite={name!r}: the calibration data have" if i else "calibration:"
            raise TFMQError(
                f"{what} no tensor named {name!r}; found {nearest_names(name, calibration.tensors)}."
            )
        given = calibration.tensors[name]
        common = torch.promote_types(values.dtype, given.dtype)
        known = {str(v) for v in values.to(common).tolist()}
        data = given.to(common).reshape(-1, *values.shape[1:]).unique(dim=0).tolist()
        outside = [v for v in data if str(v) not in known]
        if outside:
            what = f"values of {name!r}" if i else "timesteps"
            raise TFMQError(
                f"calibration: {what} {outside[:8]} are in the data but not in the schedule of {len(values)} values "
                f"({values.min().item():g} to {values.max().item():g})."
            )


def require_rows(schedule: Tensor, calibration: CalibrationSet) -> None:
    """Raise TFMQError if a timestep of the schedule (T,) has no row, so that activations can have no scales for it."""
    if missing := calibration.lacks(schedule):
        raise TFMQError(
            f"calibration: no row has the timesteps {first_of(missing)} of the schedule, for which activations would have scales of "
            'their own; give rows of each timestep, or keyed="block" for scales per timestep in the temporal block alone.'
        )
