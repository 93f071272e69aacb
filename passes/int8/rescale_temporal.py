"""Give constant qparams to activations whose scale depends on the timestep, for kernels prepared once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import aten, attribute, fixed_size, meta_value, op_name, set_buffer, weight_argument
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

ops = torch.ops.quantized_decomposed
_QUANTIZE = (ops.quantize_per_channel.default, ops.quantize_per_tensor.tensor)
PRECISE = "precise"  # in a node's meta: bfloat16 would lose what it computes
DEQUANTIZED = "dequantized"  # in a node's meta: a dequantization that nodes other than layers read
_DEQUANTIZE = (ops.dequantize_per_channel.default, ops.dequantize_per_tensor.tensor)


@declare(after=("convert",))
def rescale_temporal(gm: GraphModule) -> PassResult:
    """Move looked-up scales and zero points out of the quantized operators, by q(x; s, z) = q(x / s + z - c; 1, c).

        s, z = scale[step], zero_point[step]
        x' = dequantize(quantize(x, s, z), s, z)   ==>   y = dequantize(quantize(x / s + (z - c), 1, c), 1, c)
        linear(x', W, b), convolution(x', W, b)    ==>   (linear(y, W) - (z - c) * linear(1, W)) * s + b
        every other user of x'                     ==>   (y - (z - c)) * s

    c is a constant in the middle of the table's zero points, and y = q - c. linear(1, W) is a constant too.
    For a convolution with padding it is a map over the picture, and the zeros around x' stay zeros. Its
    computation reads the weights but does not change them.

    If all zero points of a table are c, z - c and everything computed from it are left out.

    Numerics: the integers are the same except at rounding ties (z is added before rounding, not after). A
    layer's sum is too large by (z - c) * linear(1, W), which is subtracted again. float32 is enough for this
    cancellation, and the nodes that need it are marked PRECISE. Raises TFMQError if a tensor's shape is
    unknown, or if something else reads the integers.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    for node in list(module.graph.nodes):
        if node.target in _QUANTIZE and isinstance(node.args[1], Node) and node.args[1].op != "get_attr":
            _rescale(module, node)
            modified = True
    return modified


def _rescale(gm: GraphModule, quantize: Node) -> None:
    call = gm.graph.call_function
    is_per_row = quantize.target is ops.quantize_per_channel.default
    x, scale, zero_point, *limits = quantize.args
    axis = limits.pop(0) if is_per_row else None
    assert isinstance(x, Node)
    assert isinstance(zero_point, Node)
    shape = [-1 if i == axis else 1 for i in range(_fake(x).dim())] if is_per_row else [1]
    for user in quantize.users:
        if user.target not in _DEQUANTIZE or user.args[1:] != quantize.args[1:]:
            raise TFMQError(
                f"node {user.name}: reads the integers of {quantize.name}, whose scale depends on the timestep, but does "
                "not dequantize them with the same scale; no constant scale can replace it."
            )
    with gm.graph.inserting_before(quantize):
        s = call(aten.view.default, (scale, shape))
        centre, z = _centred(gm, zero_point, limits)
        z = None if z is None else call(aten.view.default, (z, shape))
        # Multiply by the reciprocal, as the quantize operators do.
        scaled = call(aten.mul.Tensor, (x, call(aten.reciprocal.default, (s,))))
        if z is not None:
            scaled = call(aten.add.Tensor, (scaled, z))
        q = call(ops.quantize_per_tensor.default, (scaled, 1.0, centre, *limits))
        y = call(ops.dequantize_per_tensor.default, (q, 1.0, centre, *limits))
        y.meta = {"val": _fake(x)}
    for dequantize in list(quantize.users):
        for layer in list(dequantize.users):
            if axis in (None, 0) and _is_layer_of(layer, dequantize):
                _rescale_layer(gm, layer, y, s, z)
        if dequantize.users:
            with gm.graph.inserting_before(dequantize):
                value = y if z is None else call(aten.sub.Tensor, (y, z))
                value = call(aten.mul.Tensor, (value, s))
            value.meta = {**dequantize.meta, DEQUANTIZED: True}
            dequantize.replace_all_uses_with(value)


def _centred(gm: GraphModule, zero_point: Node, limits: Sequence[Any]) -> tuple[int, Node | None]:
    """Return (c, z - c in float32), or (c, None) if every z of the table is c.

    c is the middle of the table in which z is looked up, or of the integers if there is no table.
    """
    call = gm.graph.call_function
    table = zero_point.args[0] if zero_point.target is aten.index_select.default else None
    if not isinstance(table, Node) or table.op != "get_attr":
        centre = (limits[0] + limits[1] + 1) // 2
        return centre, call(
            aten.sub.Tensor, (call(aten._to_copy.default, (zero_point,), {"dtype": torch.float32}), centre)
        )
    values = attribute(gm, str(table.target))
    centre = int(values.amin() + values.amax()) // 2
    if (values == centre).all():
        return centre, None
    set_buffer(gm, f"{table.target}_centred", (values - centre).float())
    return centre, call(
        aten.index_select.default, (gm.graph.get_attr(f"{table.target}_centred"), *zero_point.args[1:])
    )


def _is_layer_of(layer: Node, x: Node) -> bool:
    """Return True for a linear or convolution of x with a quantized weight.

    Each row of x must give a row of output.
    """
    index = weight_argument(layer)
    if index is None or layer.args[0] is not x or layer.all_input_nodes.count(x) != 1 or layer.kwargs:
        return False
    weight = layer.args[index]
    if not isinstance(weight, Node) or weight.target is not ops.dequantize_per_channel.default:
        return False
    is_constant = all(n.op == "get_attr" for n in weight.all_input_nodes)
    rank = _fake(x).dim()
    return is_constant and (rank > 1 if op_name(layer) == "linear" else rank == _weight(weight).dim())


def _rescale_layer(gm: GraphModule, layer: Node, y: Node, s: Node, z: Node | None) -> None:
    call = gm.graph.call_function
    weight, bias, *rest = [*layer.args[1:], None][: max(2, len(layer.args) - 1)]
    assert isinstance(weight, Node)
    assert callable(layer.target)
    with gm.graph.inserting_before(layer):
        total = value = call(layer.target, (y, weight, None, *rest))
        total.meta = dict(layer.meta)
        if z is not None:
            value = _without_offset(gm, layer, total, y, z)
        value = call(aten.mul.Tensor, (value, s))
        if isinstance(bias, Node):
            if op_name(layer) != "linear":  # (C,) beside (N, C, H, W)
                bias = call(aten.view.default, (bias, [-1] + [1] * (_fake(y).dim() - 2)))
            value = call(aten.add.Tensor, (value, bias))
    value.meta = dict(layer.meta)
    layer.replace_all_uses_with(value)
    gm.graph.erase_node(layer)


def _without_offset(gm: GraphModule, layer: Node, total: Node, y: Node, z: Node) -> Node:
    """Return total - z * layer(1), where layer is without its bias."""
    weight, _, *rest = [*layer.args[1:], None][: max(2, len(layer.args) - 1)]
    assert isinstance(weight, Node)
    assert callable(layer.target)
    values = _weight(weight).double()
    ones = torch.ones(1, *_sizes_after_batch(y), dtype=torch.float64, device=values.device)
    name = f"{layer.name}_of_ones"
    set_buffer(gm, name, layer.target(ones, values, None, *rest).float().contiguous())
    offset = gm.graph.call_function(aten.mul.Tensor, (z, gm.graph.get_attr(name)))
    centred = gm.graph.call_function(aten.sub.Tensor, (total, offset))
    offset.meta = centred.meta = {PRECISE: True}
    total.meta[PRECISE] = True
    return centred


def _weight(dequantize: Node) -> Tensor:
    """Return the weight that a dequantize node computes from constants."""
    gm = dequantize.graph.owning_module
    assert gm is not None
    assert callable(dequantize.target)
    values = [attribute(gm, str(a.target)) if isinstance(a, Node) else a for a in dequantize.args]
    weight: Tensor = dequantize.target(*values, **dequantize.kwargs)
    return weight


def _fake(node: Node) -> Tensor:
    value: Any = meta_value(node)
    if not isinstance(value, Tensor):
        raise TFMQError(
            f"node {node.name}: its shape is unknown, and so is where the timesteps of a batch lie in it; "
            "run this pass on the graph of torch.export.export(q.network, ...).module()."
        )
    return value


def _sizes_after_batch(node: Node) -> list[int]:
    sizes = [fixed_size(d) for d in _fake(node).shape[1:]]
    if None in sizes:
        raise TFMQError(
            f"node {node.name}: shape {tuple(_fake(node).shape)}; the sizes after the batch must be fixed at capture, so "
            "that a layer's output for ones is a constant."
        )
    return [size for size in sizes if size is not None]
