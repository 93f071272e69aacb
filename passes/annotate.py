"""Say for every layer how it is quantized: a torchao Quantizer driven by a Recipe."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node

from tfmq_fx._torchao import (
    Q_ANNOTATION_KEY,
    HistogramObserver,
    MinMaxObserver,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from tfmq_fx.arithmetic import FLOAT_BITS, IntegerRange
from tfmq_fx.errors import TFMQError, nearest_names
from tfmq_fx.graph import (
    edge_layers,
    matmul_inputs,
    op_name,
    output_channel_axis,
    require_input,
    weight_argument,
)
from tfmq_fx.observers.static import StaticFakeQuantize
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.find_temporal import TemporalBlock
from tfmq_fx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Layer:
    """How one convolution or linear is quantized."""

    path: str  # the weight's name in the network's state dict
    node: str  # the node's name in the graph
    op: str  # "conv2d", "linear", ...
    weight_bits: int  # 16: float
    activation_bits: int  # 16: float
    temporal: bool  # True: inside the temporal block, activation qparams per timestep
    reason: str  # why the bits differ from the recipe's; "" when they do not


@dataclass(frozen=True, kw_only=True)
class Float:
    """Something that stays in floating point, and why."""

    name: str  # parameter path or node name
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    layers: tuple[Layer, ...]
    floats: tuple[Float, ...]


def plan(gm: GraphModule, *, recipe: Recipe, temporal: TemporalBlock) -> Plan:
    """Apply the recipe to every weighted layer of the graph. Raises TFMQError for a rule that matches nothing."""
    edges, inside = edge_layers(gm), set(temporal.nodes)
    layers, floats, unused = [], [], set(recipe.rules)
    paths = []
    for node in gm.graph.nodes:
        index = weight_argument(node)
        if index is None:
            if matmul_inputs(node):
                if recipe.attention_bits == FLOAT_BITS:
                    floats.append(
                        Float(name=node.name, reason=f"{op_name(node)}: Recipe.attention_bits is 16")
                    )
                elif any(isinstance(v, Node) for v in node.kwargs.values()):
                    floats.append(
                        Float(name=node.name, reason=f"{op_name(node)}: a tensor passed by keyword")
                    )
            continue
        weight = node.args[index] if index < len(node.args) else None
        if (
            not isinstance(weight, Node)
            or weight.op != "get_attr"
            or any(isinstance(v, Node) for v in node.kwargs.values())
        ):
            floats.append(
                Float(name=node.name, reason=f"{op_name(node)}: its weight is computed, not a parameter")
            )
            continue
        path = str(weight.target)
        paths.append(path)
        rule = next(
            (r for r in recipe.rules if fnmatchcase(path, r.pattern) and r.op in (None, op_name(node))), None
        )
        unused.discard(rule)  # type: ignore[arg-type]
        weight_bits, activation_bits, reason = recipe.weight_bits, recipe.activation_bits, ""
        if node in edges and weight_bits < recipe.edge_weight_bits:
            weight_bits, reason = recipe.edge_weight_bits, "first or last layer of an input or the output"
        if node in edges and node.name not in inside:
            activation_bits = max(activation_bits, recipe.edge_activation_bits)
        if rule is not None:
            weight_bits = rule.weight_bits or weight_bits
            activation_bits = rule.activation_bits or activation_bits
            reason = f"rule {rule.pattern!r}"
        layers.append(
            Layer(
                path=path,
                node=node.name,
                op=op_name(node),
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                temporal=node.name in inside,
                reason=reason,
            )
        )
    if unused:
        pattern = next(r.pattern for r in recipe.rules if r in unused)
        raise TFMQError(
            f"Recipe.rules: {pattern!r} matches no layer that an earlier rule leaves; nearest are {nearest_names(pattern, paths)}."
        )
    if not layers:
        raise TFMQError(
            "the graph has no convolution or linear with a parameter weight: nothing to quantize."
        )
    return Plan(layers=tuple(layers), floats=tuple(floats))


class RecipeQuantizer(Quantizer):  # type: ignore[misc]
    """torchao Quantizer: temporal observers inside the block, per-tensor FakeQuantize outside, weights per channel."""

    def __init__(self, *, recipe: Recipe, temporal: TemporalBlock, num_timesteps: int) -> None:
        self.recipe, self.temporal, self.num_timesteps = recipe, temporal, num_timesteps
        self.plan: Plan | None = None

    def annotate(self, model: GraphModule) -> GraphModule:
        self.plan = plan(model, recipe=self.recipe, temporal=self.temporal)
        nodes = {n.name: n for n in model.graph.nodes}
        batch = require_input(model, self.temporal.timestep).meta.get("val")
        floats = list(self.plan.floats)
        for layer in self.plan.layers:
            node = nodes[layer.node]
            specs: dict[Node, QuantizationSpec] = {}
            x, weight = node.args[0], node.args[weight_argument(node)]  # type: ignore[index]
            assert isinstance(x, Node)
            assert isinstance(weight, Node)
            if layer.activation_bits != FLOAT_BITS:
                wanted = layer.temporal or self.recipe.keyed == "all"
                keyed = wanted and _rows_are_samples(x, batch)
                if wanted and not keyed:
                    floats.append(
                        Float(name=x.name, reason="per tensor, not per timestep: its rows are not the batch")
                    )
                specs[x] = (
                    self._temporal(layer.activation_bits) if keyed else self._static(layer.activation_bits)
                )
            elif self.recipe.activation_bits != FLOAT_BITS:
                floats.append(
                    Float(name=f"input of {layer.path}", reason=layer.reason or "activation_bits is 16")
                )
            if layer.weight_bits != FLOAT_BITS:
                specs[weight] = self._weight(layer.weight_bits, output_channel_axis(node))
            else:
                floats.append(Float(name=layer.path, reason=layer.reason or "weight_bits is 16"))
            self._set(node, specs)
        if self.recipe.attention_bits != FLOAT_BITS:
            for node in model.graph.nodes:
                if not any(isinstance(v, Node) for v in node.kwargs.values()):
                    self._set(
                        node, {x: self._static(self.recipe.attention_bits) for x in matmul_inputs(node)}
                    )
        self.plan = Plan(layers=self.plan.layers, floats=tuple(floats))
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the plan only names nodes of this graph."""

    @staticmethod
    def _set(node: Node, specs: dict[Node, QuantizationSpec]) -> None:
        if specs:
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specs)

    def _temporal(self, bits: int) -> QuantizationSpec:
        integers = IntegerRange.activation(bits)
        observer = self.recipe.temporal_observer_class
        return QuantizationSpec(
            dtype=integers.dtype,
            observer_or_fake_quant_ctr=observer.with_args(num_timesteps=self.num_timesteps, bits=bits),
            quant_min=integers.quant_min,
            quant_max=integers.quant_max,
            qscheme=torch.per_tensor_affine,
        )

    def _static(self, bits: int) -> QuantizationSpec:
        integers = IntegerRange.activation(bits)
        observer = MinMaxObserver if self.recipe.activation_observer == "minmax" else HistogramObserver
        return QuantizationSpec(
            dtype=integers.dtype,
            observer_or_fake_quant_ctr=StaticFakeQuantize.with_args(observer=observer),
            quant_min=integers.quant_min,
            quant_max=integers.quant_max,
            qscheme=torch.per_tensor_affine,
        )

    def _weight(self, bits: int, axis: int) -> QuantizationSpec:
        integers = IntegerRange.weight(bits)
        return QuantizationSpec(
            dtype=integers.dtype,
            observer_or_fake_quant_ctr=PerChannelWeightFakeQuantize.with_args(bits=bits),
            quant_min=integers.quant_min,
            quant_max=integers.quant_max,
            qscheme=torch.per_channel_symmetric if integers.symmetric else torch.per_channel_affine,
            ch_axis=axis,
        )


def _rows_are_samples(x: Node, timestep: object) -> bool:
    """Whether dim 0 of x is the batch of timesteps; a scalar timestep serves any x; unknown shapes are trusted."""
    value = x.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(timestep, torch.Tensor) or timestep.dim() == 0:
        return True
    return value.dim() > 0 and str(value.shape[0]) == str(timestep.shape[0])
