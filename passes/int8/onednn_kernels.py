"""Run quantized convolutions and linears on oneDNN's int8 kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.arithmetic import SATURATES, ByteSums, centred, saturates
from tfmq_fx.base.onednn import FLOAT, NO_POST_OP, onednn, pack_int4
from tfmq_fx.graph.nodes import (
    attribute,
    convolution_arguments,
    hinted_shape,
    meta_value,
    op_name,
    set_buffer,
    weight_argument,
)
from tfmq_fx.passes.int8.integer_weights import SUFFIX
from tfmq_fx.passes.int8.rescale_temporal import PRECISE
from tfmq_fx.passes.pass_manager import declare

ops, tfmq = torch.ops.quantized_decomposed, torch.ops.tfmq
KERNELS = (
    onednn.qconv_pointwise.default,
    onednn.qlinear_pointwise.default,
    tfmq.int4_conv.default,
    tfmq.int4_linear.default,
)
LAY_OUT = (tfmq.lay_out_conv.default, tfmq.lay_out_linear.default)
LAYER = "layer"  # in a kernel's meta: the name of the node that it replaced
FALLBACK = "fallback"  # in a layer's meta: why it stayed as it was


@declare(after=("convert", "rescale_temporal", "byte_activations"))
def onednn_kernels(
    gm: GraphModule, *, pack: str | None = None, sums: ByteSums = ByteSums.EXACT
) -> PassResult:
    """Replace layers that read a dequantized input and weight by kernels that read their integers.

        conv(dequantize_per_tensor(x, s, z), dequantize_per_channel(w, ws, wz), b)
            ==>  qconv_pointwise(x, s, z, lay_out_conv(w - wz), ws, b)
            ==>  int4_conv(x, s, z, pack(w), wz, ws, b)            pack="int4", and w of at most four bits

    and linears alike. Layers that no kernel takes stay as they are, and their node's meta says why (FALLBACK).
    sums: those of the CPU that will compute; where they saturate, so do the layers whose weights make them.

    Numerics: the integer sums are exact and are scaled once, in float32, whereas the float layer rounds every
    product. The difference is some float32 steps of the largest output. Packed and unpacked weights give the
    same bits.
    """
    before = len(gm.graph.nodes)
    for node in list(gm.graph.nodes):
        if weight_argument(node) is not None:
            reason = _why_not(gm, node, sums)
            if reason:
                node.meta[FALLBACK] = reason
            else:
                _replace(gm, node, pack=pack)
    modified = len(gm.graph.nodes) != before
    if modified:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def set_output(kernel: Node, *, dtype: torch.dtype, scale: float = 1.0, zero_point: int = 0) -> None:
    """Make a kernel write `dtype`: bytes with this scale and zero point, or floats."""
    assert isinstance(kernel.target, torch._ops.OpOverload)
    names = [a.name for a in kernel.target._schema.arguments]
    at = next(i for i, name in enumerate(names) if name in ("output_scale", "y_scale"))
    kernel.args = (*kernel.args[:at], scale, zero_point, dtype, *kernel.args[at + 3 :])


def output_dtype(kernel: Node) -> torch.dtype:
    """Return the dtype that a kernel writes."""
    assert isinstance(kernel.target, torch._ops.OpOverload)
    names = [a.name for a in kernel.target._schema.arguments]
    dtype = kernel.args[next(i for i, name in enumerate(names) if name in ("output_dtype", "dtype"))]
    assert isinstance(dtype, torch.dtype)
    return dtype


def _why_not(gm: GraphModule, layer: Node, sums: ByteSums) -> str:
    x, weight, bias, *rest = [*layer.args, None][: max(3, len(layer.args))]
    name = op_name(layer)
    if not isinstance(weight, Node) or weight.target is not ops.dequantize_per_channel.default:
        return "its weight has scales per group: oneDNN's kernels take one per output channel"
    if not isinstance(x, Node) or x.target is not ops.dequantize_per_tensor.default:
        return "its input has no constant scale: oneDNN's kernels take one per tensor"
    if x.args[5] != torch.uint8:
        return f"its input is {x.args[5]}: oneDNN's kernels take uint8"
    if "transpose" in name or name == "convolution":
        return f"torch has no int8 kernel of oneDNN's for {name}"
    if weight.args[3] != 0 or any(n.op != "get_attr" for n in weight.all_input_nodes):
        return "its weight is not a constant with one scale per output channel"
    if rest and isinstance(rest[1] if len(rest) > 1 else None, str):
        return f"its padding is {rest[1]!r}, not numbers"
    if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
        return "its bias is computed"
    if layer.kwargs:
        return f"its arguments {', '.join(layer.kwargs)} are given by name"
    rank = _rank(layer)
    if (name == "linear" and rank < 2) or (name != "linear" and rank != _integers(gm, weight)[0].dim()):
        return "its input has no batch dimension"
    q, _, zero_point = _integers(gm, weight)
    signed = centred(q, zero_point, 0)
    if signed is None:
        return "its weight minus its zero point does not fit a signed byte"
    return SATURATES if sums is ByteSums.PAIRS and saturates(signed) else ""


def _rank(layer: Node) -> int:
    value = meta_value(layer)
    assert isinstance(value, Tensor), layer
    return value.dim()


def _integers(gm: GraphModule, weight: Node) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, scale and zero point of a weight."""
    q, scale, zero_point = (attribute(gm, str(a.target)) for a in weight.args[:3] if isinstance(a, Node))
    return q, scale, zero_point


def _replace(gm: GraphModule, layer: Node, *, pack: str | None) -> None:
    x, weight, bias = (*layer.args, None)[:3]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    assert isinstance(weight.args[0], Node)
    source = str(weight.args[0].target)
    q, _, zero_point = _integers(gm, weight)
    low, high = int(weight.args[4]), int(weight.args[5])  # type: ignore[arg-type]
    is_conv = op_name(layer) != "linear"
    place: tuple[Any, ...] = ()
    if is_conv:
        arguments = convolution_arguments(layer)
        place = tuple(arguments[name] for name in ("stride", "padding", "dilation", "groups"))
    scale_node = weight.args[1]
    read: tuple[Any, ...] = (x.args[0], x.args[1], x.args[2])
    call, get = gm.graph.call_function, gm.graph.get_attr
    with gm.graph.inserting_before(layer):
        if pack == "int4" and high - low <= 15:
            _buffer(gm, f"{source}_packed", lambda: pack_int4(q.to(torch.int16) - low))
            _buffer(gm, f"{source}_offset", lambda: (zero_point.to(torch.int16) - low).to(torch.int8))
            packed = (get(f"{source}_packed"), get(f"{source}_offset"), list(q.shape))
            target = tfmq.int4_conv.default if is_conv else tfmq.int4_linear.default
            kernel = call(target, (*read, *packed, scale_node, bias, *place, *FLOAT, torch.float32))
        else:
            _buffer(gm, f"{source}{SUFFIX}", lambda: centred(q, zero_point, 0))
            zeros = f"zeros_{q.shape[0]}"
            _buffer(gm, zeros, lambda: torch.zeros(q.shape[0], dtype=torch.int32))
            integers = get(f"{source}{SUFFIX}")
            shape = hinted_shape(x)
            if is_conv:
                given = (integers, scale_node, x.args[1], x.args[2], *place, shape)
                laid_out = call(tfmq.lay_out_conv.default, given)
            else:
                rows = torch.Size(shape[:-1]).numel()
                laid_out = call(tfmq.lay_out_linear.default, (integers, [rows, shape[-1]]))
            target = onednn.qconv_pointwise.default if is_conv else onednn.qlinear_pointwise.default
            kernel = call(
                target,
                (*read, laid_out, scale_node, get(zeros), bias, *place, *FLOAT, torch.float32, *NO_POST_OP),
            )
    kernel.meta = {k: v for k, v in layer.meta.items() if k in ("val", PRECISE)} | {LAYER: layer.name}
    layer.replace_all_uses_with(kernel)
    gm.graph.erase_node(layer)


def _buffer(gm: GraphModule, target: str, make: Any) -> None:
    """Make a buffer, unless another layer with the same weight has made it."""
    try:
        attribute(gm, target)
    except AttributeError:
        set_buffer(gm, target, make())
