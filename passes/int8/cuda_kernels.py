"""Run quantized convolutions and linears on the int8 kernels for GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.arithmetic import centred
from tfmq_fx.base.int8_kernels import LONGEST_SUM, stored, stored_packed
from tfmq_fx.graph.nodes import convolution_arguments, op_name, set_buffer, weight_argument
from tfmq_fx.passes.int8.integer_weights import SUFFIX
from tfmq_fx.passes.int8.kernels import integers_of, put_kernel, replace_layers, set_once, why_not
from tfmq_fx.passes.pass_manager import declare

tfmq = torch.ops.tfmq


@declare(after=("convert", "rescale_temporal", "rescale_tokens", "byte_activations", "signed_activations"))
def cuda_kernels(gm: GraphModule, *, pack: str | None = None) -> PassResult:
    """Replace layers that read dequantized signed bytes and a dequantized weight by kernels that read their integers.

        conv2d(dequantize_per_tensor(x, s, z), dequantize_per_channel(w, ws, wz), b)
            ==>  int8_conv2d(x, w - wz, s * ws, z * sum(w - wz), b)
            ==>  int8_conv2d(x, pack(w), wz, s * ws, z * sum(w - wz), b)      pack="int4", and w of at most four bits

    and linears alike. Weights lie channels last; channels that are not multiples of 16 are padded, here and once. Layers
    that no kernel takes stay as they are, and their node's meta says why (FALLBACK).

    Numerics: the integer sums are exact and are scaled once, in float32, whereas the float layer rounds every
    product. The difference is some float32 steps of the largest output. Packed and unpacked weights give the
    same bits.
    """
    layers = [n for n in gm.graph.nodes if weight_argument(n) is not None]
    modified = replace_layers(layers, partial(_why_not, gm), partial(_replace, gm, pack=pack))
    if modified:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def _why_not(gm: GraphModule, layer: Node) -> str:
    reason = why_not(gm, layer, whose="the GPU's", dtype=torch.int8)
    name = op_name(layer)
    if reason or name == "linear":
        return reason or _too_long(gm, layer)
    if name != "conv2d":
        return f"it is {name}: the GPU's int8 kernels are conv2d and linear"
    groups = convolution_arguments(layer)["groups"]
    return f"it has {groups} groups: the GPU's int8 kernels take one" if groups != 1 else _too_long(gm, layer)


def _too_long(gm: GraphModule, layer: Node) -> str:
    q, *_ = integers_of(gm, layer.args[1])  # type: ignore[arg-type]
    products = q[0].numel()
    return f"its sums of {products} products may exceed 32 bits" if products > LONGEST_SUM else ""


def _replace(gm: GraphModule, layer: Node, *, pack: str | None) -> None:
    x, weight, bias = (*layer.args, None)[:3]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    assert isinstance(weight.args[0], Node)
    source = str(weight.args[0].target)
    q, scale, zero_point = integers_of(gm, weight)
    signed = centred(q, zero_point, 0)
    assert signed is not None
    low, high = int(weight.args[4]), int(weight.args[5])  # type: ignore[arg-type]
    q_x, x_scale, x_zero_point = x.args[:3]
    assert isinstance(x_scale, float)
    assert isinstance(x_zero_point, int)
    get = gm.graph.get_attr
    is_packed = pack == "int4" and high - low <= 15
    set_buffer(gm, f"{layer.name}_scale", scale.float() * x_scale)
    correction = None
    with gm.graph.inserting_before(layer):
        if is_packed:
            set_once(gm, f"{source}_packed", lambda: stored_packed(q.to(torch.int16) - low))
            set_once(gm, f"{source}_offset", lambda: (zero_point.to(torch.int16) - low).to(torch.int8))
            stores: tuple[Node | None, ...] = (get(f"{source}_packed"), get(f"{source}_offset"))
        else:
            set_once(gm, f"{source}{SUFFIX}", lambda: stored(signed))
            stores = (get(f"{source}{SUFFIX}"), None)
        if x_zero_point:
            sums = x_zero_point * signed.flatten(1).sum(1, dtype=torch.int64)
            set_buffer(gm, f"{layer.name}_correction", sums.int())
            correction = get(f"{layer.name}_correction")
        target, place = tfmq.int8_linear.default, list[Any]()
        if op_name(layer) != "linear":
            arguments = convolution_arguments(layer)
            target = tfmq.int8_conv2d.default
            place = [*(arguments[name] for name in ("stride", "padding", "dilation")), x_zero_point]
        epilogue = (correction, bias, None, None, None)
        given = (*stores, get(f"{layer.name}_scale"), *epilogue, *place, "none", [], 1.0, 0, torch.float32)
        kernel = gm.graph.call_function(target, (q_x, *given))
    put_kernel(layer, kernel)
