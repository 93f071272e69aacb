"""Decide how every layer is quantized, from the recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node

from tfmq_fx.base.arithmetic import (
    FLOAT8,
    FLOAT_BITS,
    INT,
    activation_numbers,
    dtype_name,
    fitting_group_size,
    weight_numbers,
)
from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.graph.nodes import (
    aten,
    attribute,
    called_module,
    count,
    deciding_layers,
    edge_layers,
    matmul_inputs,
    meta_value,
    op_name,
    output_channel_axis,
    weight_argument,
    weight_path,
)
from tfmq_fx.graph.state import captured_of
from tfmq_fx.passes.clean.inline_regions import graph_in
from tfmq_fx.passes.low_bits.low_rank import branch_weight
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock
from tfmq_fx.recipe import Recipe, Rule


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The settings with which one convolution or linear is quantized."""

    path: str  # the weight's name in the network's state dict
    node: str  # the node's name in the graph
    op: str  # "conv2d", "linear", ...
    weight_bits: int  # 16: float
    activation_bits: int  # 16: float
    group_size: int | None = None  # how many weights of an output channel share qparams; None: all
    activation_granularity: str = "tensor"  # "token": qparams per token, at run time; "tensor": by `key`
    activation_terms: int = 1  # how many integer tensors its input is the sum of
    dtype: str = INT  # of the numbers that it multiplies: "int" or "float8_e4m3fn"
    temporal: bool  # True: inside the temporal block
    # The inputs whose values select the activation's qparams; (): one set for the tensor.
    key: tuple[str, ...] = ()
    reason: str  # why the bits differ from the recipe's; "" if they do not


@dataclass(frozen=True, kw_only=True)
class Float:
    """A parameter or node that stays in floating point, with the reason."""

    name: str  # parameter path or node name
    reason: str
    chosen: bool = True  # True: the recipe says so; False: it could not be quantized


@dataclass(frozen=True, kw_only=True)
class Note:
    """A node or parameter that is quantized differently from what was asked for, with the reason."""

    name: str  # node name or parameter path
    reason: str
    coarser: bool = True  # False: at least as fine as what was asked for


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A graph's quantization: its layers, what stays in float, and what differs from what was asked for."""

    layers: tuple[LayerPlan, ...]
    floats: tuple[Float, ...]
    notes: tuple[Note, ...] = ()

    def extended(self, other: Plan) -> Plan:
        """Return this plan with the other's floats and notes added, and its layers replacing those of the same node."""
        replaced = {layer.node: layer for layer in other.layers}
        return Plan(
            layers=tuple(replaced.get(layer.node, layer) for layer in self.layers),
            floats=(*self.floats, *other.floats),
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )


def plan(gm: GraphModule, *, recipe: Recipe, temporal: TemporalBlock) -> Plan:
    """Apply the recipe to every weighted layer of the graph. Raises TFMQError for a rule that matches nothing."""
    edges, inside = edge_layers(gm, timestep=temporal.timestep), set(temporal.nodes)
    deciding = deciding_layers(gm)
    layers: list[LayerPlan] = []
    floats: list[Float] = []
    notes: list[Note] = []
    used: set[Rule | None] = set()
    for node in gm.graph.nodes:
        _refuse_hidden(gm, node)
        notes += _joined(node)
        path = weight_path(node)
        if weight_argument(node) is None:
            floats += _unweighted(node, recipe)
        elif path is None:
            floats.append(_computed_weight(node))
        else:
            rule = _rule_for(recipe, path, op_name(node))
            used.add(rule)
            layer = _layer(node, path, recipe, edge=node in edges, temporal=node.name in inside)
            if node in deciding:
                layer = _as_deciding(layer, rule)
            layer, found = _as_possible(layer, attribute(gm, path), output_channel_axis(node))
            layer, of_dtype = _as_float8(layer, rule)
            layers.append(layer)
            notes += [*found, *of_dtype]
    _require_used(recipe, used, layers)
    if strange := {c.pattern for c in recipe.chosen} - {layer.path for layer in layers}:
        raise TFMQError(
            f"Recipe.chosen: {min(strange)!r} is no layer of this network, so the settings were chosen for another; use "
            'dataclasses.replace(recipe, chosen=()), with smooth="auto" and keyed="auto" to choose anew.'
        )
    notes += [Note(name=path, reason=_FOLDED, coarser=False) for path in captured_of(gm).folded]
    if not layers:
        raise TFMQError(
            "the graph has no convolution or linear with a parameter weight: nothing to quantize."
        )
    return Plan(layers=tuple(layers), floats=tuple(floats), notes=tuple(notes))


def _joined(node: Node) -> list[Note]:
    """Return a note if the node joins integers with floating-point numbers: then they share qparams."""
    if node.target is not aten.cat.default:
        return []
    dtypes = sorted({dtype_name(x.dtype) for x in map(meta_value, node.all_input_nodes)})
    out = meta_value(node).dtype
    if not out.is_floating_point or all(getattr(torch, d).is_floating_point for d in dtypes):
        return []
    reason = f"joins {' and '.join(dtypes)}: layers that read it quantize the integers like the rest"
    return [Note(name=node.name, reason=reason, coarser=False)]


_FOLDED = "a function of parameters alone: computed once, and its value is the weight or bias"


def _refuse_hidden(gm: GraphModule, node: Node) -> None:
    """Raise TFMQError for an operator that runs a graph of its own: its layers would silently stay in float."""
    if graph_in(gm, node) is not None:
        raise TFMQError(
            f"node {node.name}: {node.target} runs a graph of its own, in which no layer would be quantized; "
            "run passes.inline_regions on the graph first."
        )


def _unweighted(node: Node, recipe: Recipe) -> Iterator[Float]:
    """Yield what stays in float of a node without a weight.

    That is the parameters of a called module, and products of activations.
    """
    if node.op == "call_module" and next(called_module(node).parameters(), None) is not None:
        reason = "a module call that inline_modules could not follow"
        yield Float(name=str(node.target), reason=reason, chosen=False)
    if matmul_inputs(node):
        if recipe.attention_bits == FLOAT_BITS:
            yield Float(name=node.name, reason=f"{op_name(node)}: Recipe.attention_bits is 16")
        elif any(isinstance(v, Node) for v in node.kwargs.values()):
            reason = f"{op_name(node)}: a tensor passed by keyword"
            yield Float(name=node.name, reason=reason, chosen=False)


def _computed_weight(node: Node) -> Float:
    if branch := branch_weight(node):
        return Float(name=branch, reason="low-rank branch, kept in 16 bits: Recipe.low_rank")
    reason = f"{op_name(node)}: its weight is computed, not a parameter"
    return Float(name=node.name, reason=reason, chosen=False)


def _rule_for(recipe: Recipe, path: str, op: str) -> Rule | None:
    """Return the first rule that matches a layer."""
    return next((r for r in recipe.rules if fnmatchcase(path, r.pattern) and r.op in (None, op)), None)


def settings_of(recipe: Recipe, path: str, op: str) -> Rule:
    """Return the recipe's exceptions for one layer: those of the first rule that matches it, then those chosen for it.

    The pattern is that of the rule, "" if none matches.
    """
    rule = _rule_for(recipe, path, op) or Rule(pattern="")
    chosen = next((c for c in recipe.chosen if c.pattern == path), Rule(pattern=""))
    fields = {f.name for f in dataclasses.fields(Rule)} - {"pattern", "op"}
    return dataclasses.replace(rule, **{n: getattr(chosen, n) for n in fields if getattr(rule, n) is None})


def _require_used(recipe: Recipe, used: set[Rule | None], layers: list[LayerPlan]) -> None:
    """Raise TFMQError for a rule that is no layer's, saying why."""
    for rule in recipe.rules:
        if rule in used:
            continue
        matching = {x.path: x.op for x in layers if fnmatchcase(x.path, rule.pattern)}
        if matching and rule.op not in (None, *matching.values()):
            path, op = next(iter(matching.items()))
            why = f"matches {path}, which is a {op}, and no {rule.op}; change op, or leave it out"
        elif matching:
            why = "matches only layers that earlier rules match; put it before them"
        elif any(x.path.startswith(f"{rule.pattern}.") for x in layers):
            why = f"matches no layer, but a module with layers; use {f'{rule.pattern}.*'!r}"
        else:
            why = f"matches no layer; nearest are {nearest_names(rule.pattern, [x.path for x in layers])}"
        raise TFMQError(f"Recipe.rules: {rule.pattern!r} {why}.")


def smoothing_of(gm: GraphModule, recipe: Recipe) -> dict[str, float]:
    """Return SmoothQuant's alpha of every layer that is to be smoothed, by its weight's path."""
    found = {}
    for node in gm.graph.nodes:
        if (path := weight_path(node)) is not None:
            own = settings_of(recipe, path, op_name(node)).smooth
            alpha = recipe.smooth if own is None else own
            if isinstance(alpha, float | int):
                found[path] = float(alpha)
    return found


def _layer(node: Node, path: str, recipe: Recipe, *, edge: bool, temporal: bool) -> LayerPlan:
    """Return what the recipe asks for.

    edge: True for a first or last layer.
    """
    weight_bits, activation_bits, reason = recipe.weight_bits, recipe.activation_bits, ""
    if edge and weight_bits < recipe.edge_weight_bits:
        weight_bits, reason = recipe.edge_weight_bits, "first or last layer of an input or the output"
    if edge and not temporal:
        activation_bits = max(activation_bits, recipe.edge_activation_bits)
    rule = settings_of(recipe, path, op_name(node))
    if rule.pattern:
        reason = f"rule {rule.pattern!r}"
    elif rule.weight_bits or rule.activation_bits or rule.activation_terms:
        reason = "chosen: else it would be much of the output's error"
    return LayerPlan(
        path=path,
        node=node.name,
        op=op_name(node),
        weight_bits=rule.weight_bits or weight_bits,
        activation_bits=rule.activation_bits or activation_bits,
        group_size=rule.group_size or recipe.group_size,
        activation_granularity=rule.activation_granularity or recipe.activation_granularity,
        activation_terms=rule.activation_terms or 1,
        dtype=(rule.linear_dtype or recipe.linear_dtype) if op_name(node) == "linear" else INT,
        temporal=temporal,
        reason=reason,
    )


def _as_deciding(layer: LayerPlan, rule: Rule | None) -> LayerPlan:
    """Return the plan of a layer that decides what is taken: in float, but for what a rule asks of it."""
    asked = rule or Rule(pattern="")
    return dataclasses.replace(
        layer,
        weight_bits=asked.weight_bits or FLOAT_BITS,
        activation_bits=asked.activation_bits or FLOAT_BITS,
        activation_terms=asked.activation_terms or 1,
        reason=layer.reason
        if asked.pattern
        else "decides what is taken (topk): rounded, it would take others",
    )


def _as_possible(layer: LayerPlan, weight: torch.Tensor, axis: int) -> tuple[LayerPlan, list[Note]]:
    """Return the layer with the groups and the granularity that it supports, and notes where these differ.

    axis: the weight's output-channel dimension.
    """
    notes: list[Note] = []
    group_size, granularity = layer.group_size, layer.activation_granularity
    if layer.weight_bits == FLOAT_BITS:
        group_size = None
    elif group_size is not None:
        group_size, notes = _group_size(layer.path, weight, axis, group_size)
    if layer.temporal or layer.activation_bits == FLOAT_BITS:
        granularity = "tensor"
    elif granularity == "token" and layer.op != "linear":
        granularity = "tensor"
        why = "one scale per tensor: scales per token would vary inside one dot product of a convolution"
        notes = [*notes, Note(name=layer.path, reason=why)]
    return dataclasses.replace(layer, group_size=group_size, activation_granularity=granularity), notes


def _as_float8(layer: LayerPlan, rule: Rule | None) -> tuple[LayerPlan, list[Note]]:
    """Return the layer with the bits that its numbers have, and notes where these are not what was asked for.

    Raises TFMQError for an input of float8 in two terms.
    """
    if layer.dtype != FLOAT8:
        asked = rule is not None and rule.linear_dtype == FLOAT8
        why = f"{layer.op} multiplies integers: linear_dtype is for linears"
        return layer, [Note(name=layer.path, reason=why)] if asked and layer.op != "linear" else []
    if layer.activation_terms != 1:
        raise TFMQError(
            f'{layer.path}: activation_terms={layer.activation_terms} is for integers; give it linear_dtype="int" too.'
        )
    bits: dict[str, int] = {}
    notes = []
    for name, numbers in (("weight", weight_numbers), ("activation", activation_numbers)):
        wanted: int = getattr(layer, f"{name}_bits")
        bits[name] = wanted if wanted == FLOAT_BITS else numbers(wanted, layer.dtype).bits
        if bits[name] != wanted:
            why = f"{name} of {bits[name]} bits instead of {wanted}: {FLOAT8} has no fewer"
            notes.append(Note(name=layer.path, reason=why, coarser=False))
    return dataclasses.replace(layer, weight_bits=bits["weight"], activation_bits=bits["activation"]), notes


def _group_size(path: str, weight: torch.Tensor, axis: int, asked: int) -> tuple[int | None, list[Note]]:
    """Return the group size of a weight, and a note if it is not the one asked for."""
    columns = weight.numel() // weight.shape[axis]
    size = fitting_group_size(asked, columns)
    if size == asked or columns <= asked:  # a row that is no longer than a group is one group
        return size, []
    taken = "one scale per output channel" if size is None else f"groups of {size}"
    reason = f"{taken}: group_size={asked} does not divide its {columns} weights per output channel"
    return size, [Note(name=path, reason=reason, coarser=size is None)]


def table_key(
    mark: frozenset[str], *, timestep: str, sizes: Mapping[str, int], max_entries: int
) -> tuple[str, ...] | None:
    """Return the inputs in `mark`, in the order of `sizes`; None if one is not finite or the table is too large.

    mark: the inputs that a value depends on.
    max_entries: the largest product of their sizes. It does not limit a table over the timestep alone.
    """
    key = tuple(name for name in sizes if name in mark)
    fits = mark <= sizes.keys() and math.prod(sizes[n] for n in key) <= max_entries
    return key if key and (fits or key == (timestep,) == tuple(mark)) else None


def rows_are_samples(x: Node, timestep: object, *, by_entry: bool = True) -> bool:
    """Return True if dim 0 of x is the batch of timesteps, (N,), or all their entries, (N * tokens,).

    True for a scalar timestep, and for unknown shapes. by_entry: False for what does not depend on the timestep, and so has
    one row per sample, (N,), whatever the timestep's shape.
    """
    value = meta_value(x)
    if not isinstance(value, torch.Tensor) or not isinstance(timestep, torch.Tensor) or timestep.dim() == 0:
        return True
    return value.dim() > 0 and bool(
        count(value.shape[:1]) == count(timestep.shape if by_entry else timestep.shape[:1])
    )
