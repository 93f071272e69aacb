"""Insert observers: keyed on the timestep inside the temporal block, per tensor elsewhere, integers on weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base._torchao import Quantizer, prepare_pt2e
from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.arithmetic import NETWORK_DTYPES
from tfmq_fx.base.errors import TFMQError, require_type
from tfmq_fx.base.mapped import outgrows
from tfmq_fx.base.offloaded import home_of
from tfmq_fx.base.parallel import workers
from tfmq_fx.graph.inputs import placeholders, require_input, timestep_input
from tfmq_fx.graph.nodes import attribute, fresh, meta_value, weight_path
from tfmq_fx.graph.state import captured_of, set_state
from tfmq_fx.observers.temporal import TemporalObserver
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.pass_manager import CLEANING, LOW_BITS, declare
from tfmq_fx.passes.quantize.annotate import RecipeQuantizer, SplitQuantizer
from tfmq_fx.passes.quantize.batch_norms import hide_batch_norms, show_batch_norms
from tfmq_fx.passes.quantize.observed import observers, set_mode
from tfmq_fx.passes.quantize.plan import Note, Plan
from tfmq_fx.passes.quantize.state import State
from tfmq_fx.passes.quantize.two_terms import add_second_terms
from tfmq_fx.passes.temporal.entries_apart import require_entries_apart
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, find_temporal
from tfmq_fx.passes.temporal.insert_step_index import insert_step_index, key_index, step_index
from tfmq_fx.recipe import Recipe


@declare(after=(*CLEANING, *LOW_BITS))
@neutral()
def prepare(
    gm: GraphModule,
    recipe: Recipe,
    *,
    timesteps: Iterable[float] | Tensor,
    temporal: TemporalBlock | None = None,
    finite: Mapping[str, Iterable[Any] | Tensor] | None = None,
    data_quantizer: Quantizer | None = None,
) -> GraphModule:
    """Return a copy of the graph with observers, ready for `calibrate`. It shares parameters with `gm`.

        x -> linear(., w)   ==>   x -> observer(., step_index) -> linear(., integers(w))      in the block
                                  x -> fake_quantize(.)        -> linear(., integers(w))      elsewhere

    timesteps (T,): the values of the schedule, distinct and finite, in any order. The graph may take one for each sample, one for all,
        or one for each token or frame of a sample, (N, tokens).
    temporal: the result of `find_temporal`; None finds the block here, with the timestep name of the capture.
    finite: other inputs with finitely many values, name -> the values (K, ...): {"class_labels": range(10)}.
        Activations that depend on the timestep and on these inputs are keyed on the product, if that fits
        `recipe.max_table_entries`. Otherwise, and for inputs not declared here, they are keyed on the timestep,
        with ranges over sampled values, and the plan notes it (`state_of(gm).plan`).
    data_quantizer: another torchao Quantizer (x86, ...) for everything outside the temporal block.

    Raises TFMQError for timesteps or finite values that are empty, repeated or not finite, and for a block that mixes the timesteps
    of a sample.
    """
    require_type(
        recipe, Recipe, "recipe", "use Recipe.preset(name), Recipe.from_json(dict) or Recipe.read(file)"
    )
    timestep, tables, temporal = _keyed(gm, timesteps, temporal, finite)
    sizes = {name: len(values) for name, values in tables.items()}
    settings: dict[str, Any] = {"recipe": recipe, "temporal": temporal, "sizes": sizes}
    quantizer = (
        RecipeQuantizer(**settings)
        if data_quantizer is None
        else SplitQuantizer(data=data_quantizer, **settings)
    )
    copy = fresh(gm)
    hide_batch_norms(copy, shared_alone=True)
    prepared = prepare_pt2e(copy, quantizer)
    show_batch_norms(prepared)
    gm = GraphModule(prepared, prepared.graph)  # torchao's own module refuses train() and eval()
    gm.meta = dict(prepared.meta)
    finite_tables = {n: v for n, v in tables.items() if n != timestep}
    insert_step_index(gm, timesteps=tables[timestep], timestep=timestep, finite=finite_tables)
    scalar = {n for n in sizes if isinstance(v := meta_value(placeholders(gm)[n]), Tensor) and v.dim() == 0}
    initialise: list[tuple[PerChannelWeightFakeQuantize, Tensor]] = []
    for node, observer in list(observers(gm)):
        (x,) = node.args
        assert isinstance(x, Node)
        index = step_index(gm)
        if isinstance(observer, TemporalObserver):
            key = quantizer.keys[x.name]
            observer.per_sample = not scalar.issuperset(key)
            index = key_index(gm, key, timestep=timestep, sizes=sizes)
            node.args = (x, index)
        elif isinstance(observer, PerChannelWeightFakeQuantize):
            weight = attribute(gm, str(x.target))
            if weight.dtype not in NETWORK_DTYPES:
                raise TFMQError(
                    f"weight {x.target}: is {weight.dtype}, but must be float32, float16 or bfloat16; call network.float() first."
                )
            initialise.append((observer, weight))
        if x.op == "placeholder":  # torchao put the observer between the placeholders
            index.append(node)
        if x.op == "get_attr":  # torchao put it at the start, where a call would hold all weights at once
            min(node.users).prepend(node)
        set_mode(observer, observe=True, quantize=False)
    assert quantizer.plan is not None
    for node in add_second_terms(gm, quantizer.plan.layers):
        set_mode(gm.get_submodule(str(node.target)), observe=True, quantize=False)
    _map_integers(initialise, recipe.reconstruction.max_memory * 2**30)
    with workers(len(initialise)) as threads:
        threads.map(lambda pair: pair[0].initialise(pair[1]), initialise)
    gm.graph.lint()
    gm.recompile()
    set_state(gm, _state(gm, recipe, temporal, tables, quantizer.plan))
    return gm


def prepare_float(
    gm: GraphModule,
    recipe: Recipe,
    *,
    timesteps: Iterable[float] | Tensor,
    temporal: TemporalBlock | None = None,
    finite: Mapping[str, Iterable[Any] | Tensor] | None = None,
) -> GraphModule:
    """Return a copy of the graph in which nothing is quantized, ready for `cache_temporal`.

    It gets the step index and a state, as `prepare` gives them, and no observers. So it counts as calibrated. Outputs are bitwise
    unchanged. The arguments and errors are those of `prepare`.
    """
    timestep, tables, temporal = _keyed(gm, timesteps, temporal, finite)
    gm = fresh(gm)
    finite_tables = {n: v for n, v in tables.items() if n != timestep}
    insert_step_index(gm, timesteps=tables[timestep], timestep=timestep, finite=finite_tables)
    state = _state(gm, recipe, temporal, tables, Plan(layers=(), floats=()))
    nodes = {n.name: n for n in gm.graph.nodes}
    paths = tuple(weight_path(nodes[name]) or name for name in temporal.features)
    set_state(gm, dataclasses.replace(state, stage="calibrated", feature_paths=paths))
    return gm


def _keyed(
    gm: GraphModule,
    timesteps: Iterable[float] | Tensor,
    temporal: TemporalBlock | None,
    finite: Mapping[str, Iterable[Any] | Tensor] | None,
) -> tuple[str, dict[str, Tensor], TemporalBlock]:
    """Return the timestep's name, the values of each finite input, the timestep first, and the temporal block."""
    timestep = str(timestep_input(gm, temporal.timestep if temporal else None).target)
    tables = tables_of(timestep, timesteps, finite)
    for name, values in tables.items():
        if name != timestep:
            _check_shape(require_input(gm, name, argument="finite"), name, values)
    temporal = temporal or find_temporal(gm, timestep=timestep, finite=finite or ())
    require_entries_apart(gm, temporal, tables[timestep])
    return timestep, tables, temporal


def _map_integers(weights: Sequence[tuple[PerChannelWeightFakeQuantize, Tensor]], limit: float) -> None:
    """Let the integers of weights on the CPU lie in mapped files, if all together take more bytes than `limit`.

    Raises TFMQError if the disk is too small.
    """
    on_cpu = [(observer, w) for observer, w in weights if home_of(w).type == "cpu"]
    size = sum(w.numel() for _, w in on_cpu)
    if outgrows(size, limit, "prepare: the weights' integers need", "raise Reconstruction.max_memory"):
        for observer, _ in on_cpu:
            observer.mapped = True


def _state(
    gm: GraphModule, recipe: Recipe, temporal: TemporalBlock, tables: Mapping[str, Tensor], plan: Plan | None
) -> State:
    assert plan is not None
    found = captured_of(gm)
    missing = [
        Note(name=name, reason=f"Recipe.{name} is set, but passes.{name} has not run; see pipeline.stages")
        for name in LOW_BITS
        if getattr(recipe, name) is not None and name not in found.low_bits
    ]
    paths = {layer.node: layer.path for layer in plan.layers}
    return State(
        stage="prepared",
        inputs=found.inputs,
        folded=found.folded,
        low_bits=found.low_bits,
        timestep=temporal.timestep,
        recipe=recipe,
        plan=dataclasses.replace(plan, notes=(*plan.notes, *missing)),
        timesteps=tables[temporal.timestep],
        finite={name: values for name, values in tables.items() if name != temporal.timestep},
        conditioning=temporal.keys[1:],
        features=temporal.features,
        feature_keys=temporal.feature_keys,
        feature_paths=tuple(paths.get(name, name) for name in temporal.features),
        keys=frozenset(layer.key for layer in plan.layers if layer.temporal and layer.key),
    )


def tables_of(
    timestep: str,
    timesteps: Iterable[float] | Tensor,
    finite: Mapping[str, Iterable[Any] | Tensor] | None,
) -> dict[str, Tensor]:
    """Return the values of each finite input as `as_values` does, the timestep's first."""
    given = {timestep: timesteps, **(finite or {})}
    return {n: as_values(v, "timesteps" if n == timestep else f"finite[{n!r}]") for n, v in given.items()}


def as_values(given: Iterable[Any] | Tensor, name: str) -> Tensor:
    """Return the values as a tensor (T,), or (K, ...) of vectors.

    name: the argument that errors name. Raises TFMQError for values that are empty, repeated or not finite.
    """
    try:
        values = torch.as_tensor(given if isinstance(given, Tensor) else list(given))
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises any of these
        raise TFMQError(f"{name}: expected a list of numbers, found {str(given)[:80]} ({error}).") from error
    if values.dim() == 0 or values.numel() == 0 or (name == "timesteps" and values.dim() != 1):
        raise TFMQError(
            f"{name}: expected a list (1-D) of at least one value, found shape {tuple(values.shape)}."
        )
    if not torch.isfinite(values.double()).all():
        raise TFMQError(f"{name}: found NaN or infinite values; all must be finite.")
    if len(values.unique(dim=0)) != len(values):
        raise TFMQError(f"{name}: found repeated values; give each value once.")
    return values


def _check_shape(node: Node, name: str, values: Tensor) -> None:
    """Raise TFMQError unless each value has the shape of one sample of the input."""
    given = meta_value(node)
    if isinstance(given, Tensor) and tuple(values.shape[1:]) != tuple(given.shape[1:]):
        raise TFMQError(
            f"finite[{name!r}]: each value has shape {tuple(values.shape[1:])}, but one sample of this input has shape "
            f"{tuple(given.shape[1:])}."
        )
