"""Run quantized convolutions and linears on oneDNN's int8 kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.arithmetic import SATURATES, ByteSums, centred, saturates
from tfmq_fx.base.onednn import FLOAT, NO_POST_OP, onednn, pack_int4
from tfmq_fx.graph.nodes import convolution_arguments, hinted_shape, op_name, weight_argument
from tfmq_fx.passes.int8.integer_weights import SUFFIX
from tfmq_fx.passes.int8.kernels import integers_of, put_kernel, replace_layers, set_once, why_not
from tfmq_fx.passes.pass_manager import declare

ops, tfmq = torch.ops.quantized_decomposed, torch.ops.tfmq
LAY_OUT = (tfmq.lay_out_conv.default, tfmq.lay_out_linear.default)


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
    layers = [n for n in gm.graph.nodes if weight_argument(n) is not None]
    modified = replace_layers(layers, partial(_why_not, gm, sums=sums), partial(_replace, gm, pack=pack))
    if modified:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def _why_not(gm: GraphModule, layer: Node, sums: ByteSums) -> str:
    reason = why_not(gm, layer, whose="oneDNN's", dtype=torch.uint8)
    if reason or sums is not ByteSums.PAIRS:
        return reason
    q, _, zero_point = integers_of(gm, layer.args[1])  # type: ignore[arg-type]
    return SATURATES if saturates(centred(q, zero_point, 0)) else ""


def _replace(gm: GraphModule, layer: Node, *, pack: str | None) -> None:
    x, weight, bias = (*layer.args, None)[:3]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    assert isinstance(weight.args[0], Node)
    source = str(weight.args[0].target)
    q, _, zero_point = integers_of(gm, weight)
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
            set_once(gm, f"{source}_packed", lambda: pack_int4(q.to(torch.int16) - low))
            set_once(gm, f"{source}_offset", lambda: (zero_point.to(torch.int16) - low).to(torch.int8))
            packed = (get(f"{source}_packed"), get(f"{source}_offset"), list(q.shape))
            target = tfmq.int4_conv.default if is_conv else tfmq.int4_linear.default
            kernel = call(target, (*read, *packed, scale_node, bias, *place, *FLOAT, torch.float32))
        else:
            set_once(gm, f"{source}{SUFFIX}", lambda: centred(q, zero_point, 0))
            zeros = f"zeros_{q.shape[0]}"
            set_once(gm, zeros, lambda: torch.zeros(q.shape[0], dtype=torch.int32))
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
    put_kernel(layer, kernel)
