"""Write group norms by moments of each channel, for engines whose convolutions read pictures pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import add_call, aten, count, dtype_of, fixed_size, meta_value, op_name, put_in_place
from tfmq_fx.passes.pass_manager import rewrite_modules

_VIEWS = {"view", "reshape", "_unsafe_view"}


def norms_by_channel(gm: GraphModule) -> PassResult:
    """Compute the moments of group norms by channel, so that no picture is viewed as groups.

        m = by_group(mean(x, spatial)),    v = by_group(mean((x - m) ** 2, spatial))
        group_norm(x, G, w, b)  ==>  (x - m) * (rsqrt(v + eps) * w) + b

    by_group takes the mean over the C / G channels of each group, of (N, C, 1, 1). A picture viewed as groups,
    (N, G, C / G * H * W), has to lie in memory channel by channel. An engine whose convolutions read it pixel by pixel
    would move it there and back.

    It reads group_norm, native_group_norm, instance_norm, and the instance_norm of a view as groups, as which ONNX
    writes a group norm. Numerics: sums in another order.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    found = [
        _READ[n.target](n)
        for n in module.graph.nodes
        if n.target in _READ and meta_value(n.args[0]).dim() > 2
    ]
    norms = [norm for norm in found if norm is not None]
    for norm in norms:
        with module.graph.inserting_before(norm.node):
            value = _by_channel(module.graph, norm)
        for result in norm.results:
            put_in_place(result, value)
    return bool(norms)


@dataclass(frozen=True)
class _Norm:
    node: Node  # group_norm or what else computes it
    x: Node  # (N, C, *spatial)
    groups: int
    weight: Node | None  # (C,) or (G,)
    bias: Node | None  # likewise
    eps: float
    results: list[Node]  # what has the normalized picture


def _group_norm(node: Node) -> _Norm:
    given: Any = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])
    x, groups, weight, bias, eps, *_ = given
    return _Norm(node, x, groups, weight, bias, eps, [node])


def _native_group_norm(node: Node) -> _Norm | None:
    """Return None if something reads the moments, as gradients do."""
    x, weight, bias, *_, groups, eps = node.args
    if any(user.args[1] != 0 and user.users for user in node.users):
        return None
    return _Norm(node, x, groups, weight, bias, eps, list(node.users))  # type: ignore[arg-type]


def _instance_norm(node: Node) -> _Norm | None:
    """Return None if the moments are not those of the input, or if its number of channels moves."""
    x: Any
    x, weight, bias, mean, _, of_input, _, eps, *_ = node.args
    groups = fixed_size(meta_value(x).shape[1])
    if mean is not None or not of_input or groups is None:
        return None
    users = list(node.users)
    if op_name(x) in _VIEWS:
        (picture, *_), (rows, channels, *_) = x.args, (shape := _shape(x.args[0]))
        of_groups = rows == _shape(x)[0] and isinstance(channels, int) and channels % groups == 0
        if of_groups and all(op_name(user) in _VIEWS and _shape(user) == shape for user in users):
            return _Norm(node, picture, groups, weight, bias, eps, users)  # type: ignore[arg-type]
    return _Norm(node, x, groups, weight, bias, eps, [node])  # type: ignore[arg-type]


_READ: dict[Any, Callable[[Node], _Norm | None]] = {
    aten.group_norm.default: _group_norm,
    aten.native_group_norm.default: _native_group_norm,
    aten.instance_norm.default: _instance_norm,
}


def _shape(node: Node) -> list[Any]:
    """Return the sizes as numbers and expressions, which are equal if capture proved the sizes equal."""
    return [size if (size := fixed_size(d)) is not None else count([d]) for d in meta_value(node).shape]


def _by_channel(graph: Graph, norm: _Norm) -> Node:
    dtype, (_, channels, *spatial) = dtype_of(norm.x), _shape(norm.x)
    dims, size = list(range(2, 2 + len(spatial))), channels // norm.groups

    def call(target: Callable[..., Any], *args: Any) -> Node:
        return add_call(graph, target, *args)

    def for_channels(x: Node, rows: int) -> Node:
        """Repeat (rows, G) for the channels of each group, as (rows, C, 1, 1)."""
        x = call(aten.view.default, x, [rows, norm.groups, 1])
        x = call(aten.clone.default, call(aten.expand.default, x, [rows, norm.groups, size]))
        return call(aten.view.default, x, [rows, channels, *(1 for _ in spatial)])

    def mean(x: Node) -> Node:
        x = call(aten.mean.dim, x, dims, True)
        if size == 1:
            return x
        x = call(aten.view.default, x, [-1, norm.groups, size])
        return for_channels(call(aten.mean.dim, x, [2], True), -1)

    def parameter(x: Node) -> Node:
        if _shape(x) == [channels]:
            return call(aten.view.default, x, [1, channels, *(1 for _ in spatial)])
        return for_channels(x, 1)

    x = norm.x if dtype == torch.float32 else call(aten.to.dtype, norm.x, torch.float32)
    centred = call(aten.sub.Tensor, x, mean(x))
    variance = mean(call(aten.mul.Tensor, centred, centred))
    scale = call(aten.rsqrt.default, call(aten.add.Tensor, variance, norm.eps))
    if norm.weight is not None:
        scale = call(aten.mul.Tensor, scale, parameter(norm.weight))
    y = call(aten.mul.Tensor, centred, scale)
    if norm.bias is not None:
        y = call(aten.add.Tensor, y, parameter(norm.bias))
    return y if dtype == torch.float32 else call(aten.to.dtype, y, dtype)
