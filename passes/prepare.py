"""Insert observers: keyed on timestep inside the temporal block, per tensor elsewhere, integers on weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx._torchao import FakeQuantizeBase, prepare_pt2e
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import attribute, fresh, require_input
from tfmq_fx.observers.temporal import TemporalObserver
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.annotate import RecipeQuantizer
from tfmq_fx.passes.find_temporal import TemporalBlock, find_temporal
from tfmq_fx.passes.insert_step_index import insert_step_index, step_index
from tfmq_fx.recipe import Recipe


def prepare(
    gm: GraphModule, recipe: Recipe, *, timesteps: Tensor, temporal: TemporalBlock | None = None
) -> GraphModule:
    """A copy of the graph with observers, ready for `calibrate`; parameters are shared, `gm` is left as it was.

        x -> linear(., w)   ==>   x -> observer(., step_index) -> linear(., integers(w))      in the block
                                  x -> fake_quantize(.)        -> linear(., integers(w))      elsewhere

    timesteps (T,): the values of the schedule, distinct and finite, in any order.
    temporal: what `find_temporal` found; None finds it here, with the timestep name of the capture.
    Raises TFMQError for timesteps that are empty, repeated or not finite.
    """
    check_timesteps(timesteps)
    temporal = temporal or find_temporal(gm, timestep=gm.meta.get("timestep", "timestep"))
    quantizer = RecipeQuantizer(recipe=recipe, temporal=temporal, num_timesteps=len(timesteps))
    prepared = prepare_pt2e(fresh(gm), quantizer)
    gm = GraphModule(prepared, prepared.graph)  # sheds torchao's refusal of train() and eval()
    gm.meta = dict(prepared.meta)
    insert_step_index(gm, timesteps=timesteps, timestep=temporal.timestep)
    last = step_index(gm)
    value = require_input(gm, temporal.timestep).meta.get("val")
    scalar = isinstance(value, Tensor) and value.dim() == 0
    for node, observer in observers(gm):
        (x,) = node.args
        assert isinstance(x, Node)
        if x.op == "placeholder":  # prepare put it between the placeholders
            last.append(node)
        if isinstance(observer, TemporalObserver):
            observer.per_sample = not scalar
            node.args = (x, last)
        elif isinstance(observer, PerChannelWeightFakeQuantize):
            weight = attribute(gm, str(x.target))
            if weight.dtype != torch.float32:
                raise TFMQError(
                    f"weight {x.target}: is {weight.dtype}; quantize the float32 network (network.float()) instead."
                )
            observer.initialise(weight)
        set_mode(observer, observe=True, quantize=False)
    gm.graph.lint()
    gm.recompile()
    assert quantizer.plan is not None
    gm.meta.update(
        timestep=temporal.timestep,
        features=temporal.features,
        timesteps=timesteps,
        recipe=recipe,
        plan=quantizer.plan,
        stage="prepared",
    )
    return gm


def observers(gm: GraphModule) -> Iterator[tuple[Node, FakeQuantizeBase]]:
    """The observer nodes of a prepared graph with their modules, each module once, in graph order."""
    modules, seen = dict(gm.named_modules(remove_duplicate=False)), set()
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, FakeQuantizeBase) and id(module) not in seen:
                seen.add(id(module))
                yield node, module


def set_mode(observer: FakeQuantizeBase, *, observe: bool, quantize: bool) -> None:
    observer.enable_observer(observe)
    observer.enable_fake_quant(quantize)


def require_stage(gm: GraphModule, *stages: str) -> None:
    """Raise TFMQError unless the graph went through one of these stages last."""
    if gm.meta.get("stage") not in stages:
        raise TFMQError(
            f"the graph is {gm.meta.get('stage') or 'a float graph'}, but this step needs it {' or '.join(stages)}; "
            "the order is prepare, calibrate, reconstruct, convert."
        )


def check_timesteps(timesteps: Tensor) -> None:
    if timesteps.dim() != 1 or timesteps.numel() == 0:
        raise TFMQError(
            f"timesteps: a 1-D tensor of at least one value is needed, found shape {tuple(timesteps.shape)}."
        )
    if not torch.isfinite(timesteps.double()).all():
        raise TFMQError("timesteps: hold NaN or infinite values.")
    if len(timesteps.unique()) != len(timesteps):
        raise TFMQError("timesteps: hold repeated values; give each value of the schedule once.")
