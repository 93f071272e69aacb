"""Annotate every layer with how it is quantized: a torchao Quantizer driven by a Recipe."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tfmq_fx.base._torchao import (
    Q_ANNOTATION_KEY,
    HistogramObserver,
    MinMaxObserver,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from tfmq_fx.base.arithmetic import (
    FLOAT_BITS,
    Float8Range,
    IntegerRange,
    NumberRange,
    activation_numbers,
    token_numbers,
    weight_numbers,
)
from tfmq_fx.graph.inputs import require_input
from tfmq_fx.graph.nodes import matmul_inputs, meta_value, op_name, output_channel_axis, weight_argument
from tfmq_fx.observers.float8 import Float8FakeQuantize
from tfmq_fx.observers.static import StaticFakeQuantize
from tfmq_fx.observers.token import TokenFakeQuantize
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.plan import (
    Float,
    LayerPlan,
    Note,
    Plan,
    plan,
    rows_are_samples,
    settings_of,
    table_key,
)
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, taint
from tfmq_fx.recipe import Recipe


class RecipeQuantizer(Quantizer):  # type: ignore[misc]
    """A torchao Quantizer that follows a Recipe.

    Activations get temporal observers inside the temporal block, and fake quantizers per tensor or per token
    outside. Weights are quantized per channel or per group.

    sizes: the finite inputs, the timestep first: name -> number of values.
    """

    def __init__(self, *, recipe: Recipe, temporal: TemporalBlock, sizes: Mapping[str, int]) -> None:
        self.recipe, self.temporal, self.sizes = recipe, temporal, sizes
        self.plan: Plan | None = None
        self.keys: dict[str, tuple[str, ...]] = {}  # observed node -> the key of its qparams

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate the graph in place by the recipe, and set `plan` and `keys`."""
        found = plan(model, recipe=self.recipe, temporal=self.temporal)
        done = self._annotate_layers(model, found.layers)
        if self.recipe.attention_bits != FLOAT_BITS:
            for node in model.graph.nodes:
                if not any(isinstance(v, Node) for v in node.kwargs.values()):
                    self._set(node, {x: self._operand(x) for x in matmul_inputs(node)})
        self.plan = found.extended(done)
        return model

    def _annotate_layers(self, model: GraphModule, layers: Iterable[LayerPlan]) -> Plan:
        """Annotate these layers. Return them with their keys, what stays in float, and notes on coarser keys."""
        nodes, marks = {n.name: n for n in model.graph.nodes}, taint(model)
        done, floats, notes = [], [], []
        for layer in layers:
            node = nodes[layer.node]
            x, weight = node.args[0], node.args[weight_argument(node)]  # type: ignore[index]
            assert isinstance(x, Node)
            assert isinstance(weight, Node)
            specs: dict[Node, QuantizationSpec] = {}
            if layer.activation_bits != FLOAT_BITS:
                layer, reason = self._keyed(layer, x, marks[x])
                specs[x] = self._activation(layer)
                notes += [Note(name=x.name, reason=reason)] if reason else []
            elif self.recipe.activation_bits != FLOAT_BITS:
                why = layer.reason or "activation_bits is 16"
                floats.append(Float(name=f"input of {layer.path}", reason=why))
            if layer.weight_bits != FLOAT_BITS:
                specs[weight] = self._weight(layer, output_channel_axis(node))
            else:
                floats.append(Float(name=layer.path, reason=layer.reason or "weight_bits is 16"))
            done.append(layer)
            self._set(node, specs)
        return Plan(layers=tuple(done), floats=tuple(floats), notes=tuple(notes))

    def _keyed(self, layer: LayerPlan, x: Node, mark: frozenset[str]) -> tuple[LayerPlan, str]:
        """Return the layer with the key of its input's qparams, and why the key is coarser than needed, or ""."""
        if layer.activation_granularity == "token" or layer.activation_terms == 2:
            return layer, ""
        key, reason = self._key(layer, x, mark)
        if key:
            self.keys[x.name] = key
        return dataclasses.replace(layer, key=key), reason

    def _activation(self, layer: LayerPlan) -> QuantizationSpec:
        if layer.activation_granularity == "token":
            return self._token(layer.activation_bits, layer.dtype)
        numbers = activation_numbers(layer.activation_bits, layer.dtype)
        if layer.activation_terms == 2:  # the second term relies on the first covering the whole range
            return self._per_tensor(numbers, MinMaxObserver)
        if not layer.key:
            return self._per_tensor(numbers)
        num_keys = math.prod(self.sizes[n] for n in layer.key)
        return self._temporal(layer, numbers, num_keys)

    def _key(self, layer: LayerPlan, x: Node, mark: frozenset[str]) -> tuple[tuple[str, ...], str]:
        """Return the key of the qparams of a layer's input, and why the key is coarser than needed, or "".

        The key is () for one set of qparams per tensor.
        """
        timestep = self.temporal.timestep
        batch = meta_value(require_input(x.graph.owning_module, timestep))  # type: ignore[arg-type]
        if (
            not layer.temporal
            and (settings_of(self.recipe, layer.path, layer.op).keyed or self.recipe.keyed) != "all"
        ):
            return (), ""
        if not layer.temporal and isinstance(batch, torch.Tensor) and batch.dim() > 1:
            return (), "one scale per tensor: its samples have several timesteps each"
        if not rows_are_samples(x, batch, by_entry=timestep in mark or not layer.temporal):
            return (), "one scale per tensor: its rows are not the samples of the batch"
        if not layer.temporal:
            return (timestep,), ""
        key = table_key(mark, timestep=timestep, sizes=self.sizes, max_entries=self.recipe.max_table_entries)
        if key is not None:
            return key, ""
        unknown = sorted(mark - self.sizes.keys())
        why = (
            f"depends on {', '.join(unknown)}, not declared finite"
            if unknown
            else f"{' x '.join(str(self.sizes[n]) for n in self.sizes if n in mark)} values of {', '.join(sorted(mark))} "
            f"exceed max_table_entries={self.recipe.max_table_entries}"
        )
        if timestep in mark:
            return (timestep,), f"one scale per timestep over sampled values: {why}"
        return (), f"one scale over sampled values: {why}"

    def validate(self, model: GraphModule) -> None:
        """Do nothing: the plan names only nodes of this graph."""

    @staticmethod
    def _set(node: Node, specs: dict[Node, QuantizationSpec]) -> None:
        if specs:
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)

    def _temporal(self, layer: LayerPlan, numbers: NumberRange, num_keys: int) -> QuantizationSpec:
        observer = self.recipe.temporal_observer_class
        shared = {} if layer.temporal or not self.recipe.shared_zero_point else {"shared_zero_point": True}
        bits = layer.activation_bits
        return _spec(numbers, observer.with_args(num_keys=num_keys, bits=bits, **shared))

    def _operand(self, x: Node) -> QuantizationSpec:
        """Return the spec of an operand of a product of two activations. Int8 kernels take these without zero points."""
        bits, positive = self.recipe.attention_bits, op_name(x) in ("softmax", "_softmax")
        return self._per_tensor(IntegerRange.activation(bits) if positive else IntegerRange.operand(bits))

    def _per_tensor(self, numbers: NumberRange, observer: Any = None) -> QuantizationSpec:
        if observer is None:
            observer = MinMaxObserver if self.recipe.activation_observer == "minmax" else HistogramObserver
        static = Float8FakeQuantize if isinstance(numbers, Float8Range) else StaticFakeQuantize
        return _spec(numbers, static.with_args(observer=observer))

    @staticmethod
    @functools.cache  # with equal specs, linears that read the same tokens share one fake quantizer
    def _token(bits: int, dtype: str) -> QuantizationSpec:
        return _spec(token_numbers(bits, dtype), TokenFakeQuantize.with_args(bits=bits))

    @staticmethod
    def _weight(layer: LayerPlan, axis: int) -> QuantizationSpec:
        numbers = weight_numbers(layer.weight_bits, layer.dtype)
        observer = PerChannelWeightFakeQuantize.with_args(bits=layer.weight_bits, group_size=layer.group_size)
        schemes = torch.per_channel_symmetric, torch.per_channel_affine
        return _spec(numbers, observer, schemes, ch_axis=axis)


def _spec(
    numbers: NumberRange,
    observer: Any,
    schemes: tuple[torch.qscheme, torch.qscheme] = (torch.per_tensor_symmetric, torch.per_tensor_affine),
    **more: Any,
) -> QuantizationSpec:
    """Return what torchao builds an observer from. schemes: of a symmetric range, and of any other."""
    return QuantizationSpec(
        dtype=numbers.dtype,
        observer_or_fake_quant_ctr=observer,
        quant_min=numbers.quant_min,
        quant_max=numbers.quant_max,
        qscheme=schemes[0 if numbers.symmetric else 1],
        **more,
    )


class SplitQuantizer(RecipeQuantizer):
    """A torchao Quantizer that uses the recipe for the temporal block and another Quantizer for everything else.

    data: the other torchao Quantizer.
    """

    def __init__(self, *, data: Quantizer, **rest: Any) -> None:
        super().__init__(**rest)
        self.data = data

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        return self.data.transform_for_annotation(model)  # type: ignore[no-any-return]

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate the graph in place, with the other quantizer first, and set `plan` and `keys`."""
        found = plan(model, recipe=self.recipe, temporal=self.temporal)
        theirs = [layer for layer in found.layers if not layer.temporal]
        paths = {layer.path for layer in theirs}
        mine = Plan(
            layers=tuple(layer for layer in found.layers if layer.temporal),
            floats=found.floats,
            notes=tuple(n for n in found.notes if n.name not in paths),
        )
        # The other quantizer may annotate the temporal block too: it goes first, and its annotations are dropped.
        self.data.annotate(model)
        nodes = {n.name: n for n in model.graph.nodes}
        for name in self.temporal.nodes:
            nodes[name].meta.pop(Q_ANNOTATION_KEY, None)
        done = self._annotate_layers(model, mine.layers)
        self.plan = mine.extended(done).extended(self._of_theirs(model, theirs))
        return model

    def _of_theirs(self, model: GraphModule, layers: Iterable[LayerPlan]) -> Plan:
        """Return what the other quantizer leaves in float, and notes on what it annotated."""
        name, inside = type(self.data).__name__, set(self.temporal.nodes)
        annotated = [
            n.name
            for n in model.graph.nodes
            if n.name not in inside and Q_ANNOTATION_KEY in n.meta and weight_argument(n) is not None
        ]
        left = [layer.path for layer in layers if layer.node not in annotated]
        reason = f"{name} does not annotate it"
        return Plan(
            layers=(),
            floats=tuple(Float(name=path, reason=reason, chosen=False) for path in left),
            notes=tuple(Note(name=n, reason=f"annotated by {name}") for n in annotated),
        )
