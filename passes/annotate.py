"""Say for every layer how it is quantized: a torchao Quantizer driven by a Recipe."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
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
from tfmq_fx.arithmetic import FLOAT_BITS, IntegerRange, fitting_group_size
from tfmq_fx.errors import TFMQError, nearest_names
from tfmq_fx.graph import (
    attribute,
    called_module,
    edge_layers,
    matmul_inputs,
    meta_value,
    op_name,
    output_channel_axis,
    require_input,
    weight_argument,
)
from tfmq_fx.observers.static import StaticFakeQuantize
from tfmq_fx.observers.token import TokenFakeQuantize
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.find_temporal import TemporalBlock, taint
from tfmq_fx.passes.low_rank import branch_weight
from tfmq_fx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Layer:
    """How one convolution or linear is quantized."""

    path: str  # the weight's name in the network's state dict
    node: str  # the node's name in the graph
    op: str  # "conv2d", "linear", ...
    weight_bits: int  # 16: float
    activation_bits: int  # 16: float
    group_size: int | None = None  # weights of an output channel that share qparams; None: all
    activation_granularity: str = "tensor"  # "token": qparams per token, at run time; "tensor": as `key` says
    temporal: bool  # True: inside the temporal block
    key: tuple[
        str, ...
    ] = ()  # the inputs whose values select the activation's qparams; (): one for the tensor
    reason: str  # why the bits differ from the recipe's; "" when they do not


@dataclass(frozen=True, kw_only=True)
class Float:
    """Something that stays in floating point, and why."""

    name: str  # parameter path or node name
    reason: str
    chosen: bool = True  # whether the recipe says so; False: it could not be quantized


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that is quantized otherwise than asked for, and why."""

    name: str  # node name or parameter path
    reason: str
    coarser: bool = True  # False: at least as finely as asked for


@dataclass(frozen=True, kw_only=True)
class Plan:
    layers: tuple[Layer, ...]
    floats: tuple[Float, ...]
    notes: tuple[Note, ...] = ()


def plan(gm: GraphModule, *, recipe: Recipe, temporal: TemporalBlock) -> Plan:
    """Apply the recipe to every weighted layer of the graph. Raises TFMQError for a rule that matches nothing."""
    edges, inside = edge_layers(gm, timestep=temporal.timestep), set(temporal.nodes)
    layers, floats, notes, unused = [], [], [], set(recipe.rules)
    paths = []
    for node in gm.graph.nodes:
        index = weight_argument(node)
        if index is None:
            if node.op == "call_module" and next(called_module(node).parameters(), None) is not None:
                floats.append(
                    Float(
                        name=str(node.target),
                        reason="a module call that inline_modules could not follow",
                        chosen=False,
                    )
                )
            if matmul_inputs(node):
                if recipe.attention_bits == FLOAT_BITS:
                    floats.append(
                        Float(name=node.name, reason=f"{op_name(node)}: Recipe.attention_bits is 16")
                    )
                elif any(isinstance(v, Node) for v in node.kwargs.values()):
                    floats.append(
                        Float(
                            name=node.name,
                            reason=f"{op_name(node)}: a tensor passed by keyword",
                            chosen=False,
                        )
                    )
            continue
        weight = node.args[index] if index < len(node.args) else None
        if (
            not isinstance(weight, Node)
            or weight.op != "get_attr"
            or any(isinstance(v, Node) for v in node.kwargs.values())
        ):
            branch = branch_weight(node)
            floats.append(
                Float(name=branch, reason="low-rank branch, kept in 16 bits: Recipe.low_rank")
                if branch
                else Float(
                    name=node.name,
                    reason=f"{op_name(node)}: its weight is computed, not a parameter",
                    chosen=False,
                )
            )
            continue
        path = str(weight.target)
        paths.append(path)
        rule = next(
            (r for r in recipe.rules if fnmatchcase(path, r.pattern) and r.op in (None, op_name(node))), None
        )
        unused.discard(rule)  # type: ignore[arg-type]
        weight_bits, activation_bits, reason = recipe.weight_bits, recipe.activation_bits, ""
        group_size, granularity = recipe.group_size, recipe.activation_granularity
        if node in edges and weight_bits < recipe.edge_weight_bits:
            weight_bits, reason = recipe.edge_weight_bits, "first or last layer of an input or the output"
        if node in edges and node.name not in inside:
            activation_bits = max(activation_bits, recipe.edge_activation_bits)
        if rule is not None:
            weight_bits = rule.weight_bits or weight_bits
            activation_bits = rule.activation_bits or activation_bits
            group_size = rule.group_size or group_size
            granularity = rule.activation_granularity or granularity
            reason = f"rule {rule.pattern!r}"
        if weight_bits == FLOAT_BITS:
            group_size = None
        elif group_size is not None:
            group_size, note = _group_size(path, attribute(gm, path), output_channel_axis(node), group_size)
            notes += note
        if node.name in inside or activation_bits == FLOAT_BITS:
            granularity = "tensor"
        elif granularity == "token" and op_name(node) != "linear":
            granularity = "tensor"
            why = "one scale per tensor: scales per token would vary inside one dot product of a convolution"
            notes.append(Note(name=path, reason=why))
        layers.append(
            Layer(
                path=path,
                node=node.name,
                op=op_name(node),
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                group_size=group_size,
                activation_granularity=granularity,
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
    return Plan(layers=tuple(layers), floats=tuple(floats), notes=tuple(notes))


def _group_size(path: str, weight: torch.Tensor, axis: int, asked: int) -> tuple[int | None, list[Note]]:
    """The group size of a weight, and a note where that is not what was asked for."""
    columns = weight.numel() // weight.shape[axis]
    size = fitting_group_size(asked, columns)
    if size == asked or columns <= asked:  # a row no longer than a group is one
        return size, []
    taken = "one scale per output channel" if size is None else f"groups of {size}"
    reason = f"{taken}: group_size={asked} does not divide its {columns} weights per output channel"
    return size, [Note(name=path, reason=reason, coarser=size is None)]


def table_key(
    mark: frozenset[str], *, timestep: str, sizes: Mapping[str, int], max_entries: int
) -> tuple[str, ...] | None:
    """The inputs of `mark` in the order of `sizes` when all are finite and their product fits, else None."""
    key = tuple(name for name in sizes if name in mark)
    fits = mark <= sizes.keys() and math.prod(sizes[n] for n in key) <= max_entries
    return key if key and (fits or key == (timestep,) == tuple(mark)) else None


class RecipeQuantizer(Quantizer):  # type: ignore[misc]
    """torchao Quantizer: temporal observers inside the block, per-tensor or per-token FakeQuantize outside, weights per
    channel or group.

    sizes: the finite inputs, the timestep first, name -> number of values.
    data: another torchao Quantizer that annotates everything outside the temporal block instead.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        temporal: TemporalBlock,
        sizes: Mapping[str, int],
        data: Quantizer | None = None,
    ) -> None:
        self.recipe, self.temporal, self.sizes, self.data = recipe, temporal, sizes, data
        self.plan: Plan | None = None
        self.keys: dict[str, tuple[str, ...]] = {}  # observed node -> the key of its qparams

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        return model if self.data is None else self.data.transform_for_annotation(model)

    def annotate(self, model: GraphModule) -> GraphModule:
        self.plan = plan(model, recipe=self.recipe, temporal=self.temporal)
        nodes = {n.name: n for n in model.graph.nodes}
        floats, layers = list(self.plan.floats), []
        theirs = {n.path for n in self.plan.layers if self.data is not None and not n.temporal}
        notes = [n for n in self.plan.notes if n.name not in theirs]
        marks = taint(model)
        inside = set(self.temporal.nodes)
        if self.data is not None:
            # Theirs first, then the temporal block is ours again, whatever they wrote there.
            self.data.annotate(model)
            for name in inside:
                nodes[name].meta.pop(Q_ANNOTATION_KEY, None)
        for layer in self.plan.layers:
            node = nodes[layer.node]
            if self.data is not None and not layer.temporal:
                if Q_ANNOTATION_KEY not in node.meta:
                    reason = f"{type(self.data).__name__} does not annotate it"
                    floats.append(Float(name=layer.path, reason=reason, chosen=False))
                continue
            specs: dict[Node, QuantizationSpec] = {}
            x, weight = node.args[0], node.args[weight_argument(node)]  # type: ignore[index]
            assert isinstance(x, Node)
            assert isinstance(weight, Node)
            if layer.activation_granularity == "token":
                specs[x] = self._token(layer.activation_bits)
            elif layer.activation_bits != FLOAT_BITS:
                key, reason = self._key(x, marks[x], temporal=layer.temporal)
                if reason:
                    notes.append(Note(name=x.name, reason=reason))
                if key:
                    self.keys[x.name] = key
                    num_keys = math.prod(self.sizes[n] for n in key)
                    specs[x] = self._temporal(layer.activation_bits, num_keys, temporal=layer.temporal)
                else:
                    specs[x] = self._static(layer.activation_bits)
                layer = dataclasses.replace(layer, key=key)
            elif self.recipe.activation_bits != FLOAT_BITS:
                floats.append(
                    Float(name=f"input of {layer.path}", reason=layer.reason or "activation_bits is 16")
                )
            if layer.weight_bits != FLOAT_BITS:
                specs[weight] = self._weight(layer.weight_bits, layer.group_size, output_channel_axis(node))
            else:
                floats.append(Float(name=layer.path, reason=layer.reason or "weight_bits is 16"))
            layers.append(layer)
            self._set(node, specs)
        if self.recipe.attention_bits != FLOAT_BITS and self.data is None:
            for node in model.graph.nodes:
                if not any(isinstance(v, Node) for v in node.kwargs.values()):
                    self._set(node, {x: self._operand(x) for x in matmul_inputs(node)})
        if self.data is not None:
            notes += [
                Note(name=n.name, reason=f"annotated by {type(self.data).__name__}")
                for n in model.graph.nodes
                if n.name not in inside and Q_ANNOTATION_KEY in n.meta and weight_argument(n) is not None
            ]
        self.plan = Plan(layers=tuple(layers), floats=tuple(floats), notes=tuple(dict.fromkeys(notes)))
        return model

    def _key(self, x: Node, mark: frozenset[str], *, temporal: bool) -> tuple[tuple[str, ...], str]:
        """The key of an activation's qparams, () for one per tensor; and why it is coarser than x deserves, or ""."""
        timestep = self.temporal.timestep
        batch = meta_value(require_input(x.graph.owning_module, timestep))  # type: ignore[arg-type]
        if not temporal and self.recipe.keyed != "all":
            return (), ""
        if not rows_are_samples(x, batch):
            return (), "one scale per tensor: its rows are not the batch"
        if not temporal:
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
        """Nothing to check: the plan only names nodes of this graph."""

    @staticmethod
    def _set(node: Node, specs: dict[Node, QuantizationSpec]) -> None:
        if specs:
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)

    def _temporal(self, bits: int, num_keys: int, *, temporal: bool) -> QuantizationSpec:
        integers = IntegerRange.activation(bits)
        observer = self.recipe.temporal_observer_class
        shared = {} if temporal or not self.recipe.shared_zero_point else {"shared_zero_point": True}
        return QuantizationSpec(
            dtype=integers.dtype,
            observer_or_fake_quant_ctr=observer.with_args(num_keys=num_keys, bits=bits, **shared),
            quant_min=integers.quant_min,
            quant_max=integers.quant_max,
            qscheme=torch.per_tensor_affine,
        )

    def _static(self, bits: int) -> QuantizationSpec:
        return self._per_tensor(IntegerRange.activation(bits))

    def _operand(self, x: Node) -> QuantizationSpec:
        """Of a product of two activations, which int8 kernels take without zero points."""
        bits, positive = self.recipe.attention_bits, op_name(x) in ("softmax", "_softmax")
        return self._per_tensor(IntegerRange.activation(bits) if positive else IntegerRange.operand(bits))

    def _per_tensor(self, integers: IntegerRange) -> QuantizationSpec:
        observer = MinMaxObserver if self.recipe.activation_observer == "minmax" else HistogramObserver
        return QuantizationSpec(
            dtype=integers.dtype,
            observer_or_fake_quant_ctr=StaticFakeQuantize.with_args(observer=observer),
            quant_min=integers.quant_min,
            quant_max=integers.quant_max,
            qscheme=torch.per_tensor_symmetric if integers.symmetric else torch.per_tensor_affine,
        )

    @staticmethod
    @functools.cache  # equal specs: linears that read the same tokens share one fake quantize
    def _token(bits: int) -> QuantizationSpec:
        integers = IntegerRange.token(bits)
        return QuantizationSpec(
            dtype=integers.dtype,
            observer_or_fake_quant_ctr=TokenFakeQuantize.with_args(bits=bits),
            quant_min=integers.quant_min,
            quant_max=integers.quant_max,
            qscheme=torch.per_tensor_symmetric,
        )

    def _weight(self, bits: int, group_size: int | None, axis: int) -> QuantizationSpec:
        integers = IntegerRange.weight(bits)
        return QuantizationSpec(
            dtype=integers.dtype,
            observer_or_fake_quant_ctr=PerChannelWeightFakeQuantize.with_args(
                bits=bits, group_size=group_size
            ),
            quant_min=integers.quant_min,
            quant_max=integers.quant_max,
            qscheme=torch.per_channel_symmetric if integers.symmetric else torch.per_channel_affine,
            ch_axis=axis,
        )


def rows_are_samples(x: Node, timestep: object) -> bool:
    """Whether dim 0 of x is the batch of timesteps; a scalar timestep serves any x; unknown shapes are trusted."""
    value = meta_value(x)
    if not isinstance(value, torch.Tensor) or not isinstance(timestep, torch.Tensor) or timestep.dim() == 0:
        return True
    return value.dim() > 0 and str(value.shape[0]) == str(timestep.shape[0])
