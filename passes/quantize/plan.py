"""Decide for every layer how it is quantized, by the recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node

from tfmq_fx.base.arithmetic import FLOAT_BITS, fitting_group_size
from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.graph.nodes import (
    attribute,
    called_module,
    edge_layers,
    matmul_inputs,
    meta_value,
    op_name,
    output_channel_axis,
    weight_argument,
)
from tfmq_fx.passes.low_bits.low_rank import branch_weight
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock
from tfmq_fx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
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
    layers: tuple[LayerPlan, ...]
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
            LayerPlan(
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


def rows_are_samples(x: Node, timestep: object) -> bool:
    """Whether dim 0 of x is the batch of timesteps; a scalar timestep serves any x; unknown shapes are trusted."""
    value = meta_value(x)
    if not isinstance(value, torch.Tensor) or not isinstance(timestep, torch.Tensor) or timestep.dim() == 0:
        return True
    return value.dim() > 0 and str(value.shape[0]) == str(timestep.shape[0])
