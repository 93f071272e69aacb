"""Run linears of float8 numbers on the tensor cores of GPUs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base import float8
from tfmq_fx.base.arithmetic import centred
from tfmq_fx.base.float8_kernels import LEAST, MULTIPLE, padded, stored
from tfmq_fx.graph.float8 import Dequantized, dequantized, is_cast, quantized_from, scale_nodes
from tfmq_fx.graph.nodes import aten, attribute, hinted_shape, op_name, set_buffer, weight_argument
from tfmq_fx.passes.int8.kernels import FLOAT8_KERNEL, integers_of, ops, put_kernel, replace_layers, set_once
from tfmq_fx.passes.pass_manager import declare

SUFFIX = "_float8"  # of the buffer that holds the numbers as the kernel reads them
EXACT = 2**float8.EXACT_BITS  # the largest integer up to which all are exact


@declare(after=("convert", "cuda_kernels"))
def float8_kernels(gm: GraphModule, *, capability: tuple[int, int] | None = None) -> PassResult:
    """Replace linears that read two dequantized float8 tensors, or one and a weight of few bits, by a kernel for them.

        linear(to(x, float32) * s, to(w, float32) * ws, b)
            ==>  float8_linear(x, w, ws * s, None, b, float32)      s: a number
            ==>  float8_linear(x, w, ws, s, b, float32)             s: one for each sample or token
        linear(to(x, float32) * s, dequantize_per_channel(w, ws, wz), b)
            ==>  float8_linear(x, to(w - wz, float8), ..)           |w - wz| <= 16, so that it is exact

    A weight's sizes that are not multiples of 16 are padded, here and once. Layers that no kernel takes stay as they are, and
    their node's meta says why (FALLBACK). Equal roundings of one tensor by a number become one.

    capability: the GPU's compute capability; None: one that has the kernels.

    Numerics: the float layer rounds each product to float32; the kernel's are exact, and are scaled once. A weight of 4 bits
    takes 8 in memory.
    """
    merged = _merge(gm)
    layers = [
        n for n in gm.graph.nodes if weight_argument(n) is not None and dequantized(n.args[0]) is not None
    ]
    replaced = replace_layers(layers, partial(_why_not, gm, capability=capability), partial(_replace, gm))
    modified = merged or replaced
    if modified:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def _merge(gm: GraphModule) -> bool:
    """Replace equal roundings of a tensor, such as those of q, k and v, by the first of them; True if there were any."""
    first: dict[tuple[object, ...], Node] = {}
    merged = False
    for node in gm.graph.nodes:
        chain = quantized_from(node) if is_cast(node, float8.DTYPE) else ()
        if chain and isinstance(factor := chain[-2].args[1], float):
            x = chain[0].args[0]
            while is_cast(x, torch.float32):
                x = x.args[0]  # type: ignore[union-attr]
            other = first.setdefault((x, factor), node)
            if other is not node:
                node.replace_all_uses_with(other)
                merged = True
    return merged


def _why_not(gm: GraphModule, layer: Node, *, capability: tuple[int, int] | None) -> str:
    """Return why no kernel can take a layer with a float8 input; "" if one can."""
    x, (_, weight, bias) = dequantized(layer.args[0]), (*layer.args, None)[:3]
    assert x is not None
    if capability is not None and capability < LEAST:
        found, least = (".".join(map(str, c)) for c in (capability, LEAST))
        return f"float8 kernels need compute capability {least}, and this GPU has {found}"
    if op_name(layer) != "linear" or layer.kwargs:
        return f"it is {op_name(layer)}: the GPU's float8 kernels are linears"
    if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
        return "its bias is computed"
    if len(hinted_shape(layer)) < 2:
        return "its input has no batch dimension"
    if isinstance(x.scale, Node) and hinted_shape(x.scale)[-1:] not in ([], [1]):
        return "its input has scales per channel: the GPU's float8 kernels take them per row"
    return _why_not_weight(gm, weight)


def _why_not_weight(gm: GraphModule, weight: object) -> str:
    assert isinstance(weight, Node)
    numbers = dequantized(weight)
    if numbers is not None and _is_by_channel(numbers):
        return ""
    if numbers is None and weight.target is not ops.dequantize_per_channel.default:
        return f"its weight has scales per group, or is no constant: the GPU's {FLOAT8_KERNEL} takes one per output channel"
    if numbers is not None or weight.args[3] != 0 or any(n.op != "get_attr" for n in weight.all_input_nodes):
        return "its weight is not a constant with one scale per output channel"
    q, _, zero_point = integers_of(gm, weight)
    signed = centred(q, zero_point, 0)
    exact = signed is not None and int(signed.to(torch.int16).abs().max()) <= EXACT
    return "" if exact else f"its integers exceed {EXACT}: float8_e4m3fn does not hold them exactly"


def _is_by_channel(numbers: Dequantized) -> bool:
    """Return True for a constant weight (C_out, C_in) with constant scales (C_out, 1)."""
    q, chain = numbers.q, scale_nodes(numbers.scale)
    if q.op != "get_attr" or [op_name(n) or n.op for n in chain] != ["view", "get_attr"]:
        return False
    assert q.graph.owning_module is not None
    rank: int = attribute(q.graph.owning_module, str(q.target)).dim()
    return rank == 2 and list(chain[0].args[1]) == [-1, 1]  # type: ignore[arg-type]


def _replace(gm: GraphModule, layer: Node) -> None:
    x, (_, weight, bias) = dequantized(layer.args[0]), (*layer.args, None)[:3]
    assert x is not None
    assert isinstance(weight, Node)
    source, numbers, scale = _weight(gm, weight)
    set_once(gm, f"{source}{SUFFIX}", lambda: stored(numbers))
    channels = numbers.shape[0]
    wide = -(-channels // MULTIPLE) * MULTIPLE
    row_scale, factor = (x.scale, 1.0) if isinstance(x.scale, Node) else (None, x.scale)
    scale = scale.float() * factor
    set_buffer(gm, f"{layer.name}_scale", padded(scale, wide).contiguous())
    get, call = gm.graph.get_attr, gm.graph.call_function
    with gm.graph.inserting_before(layer):
        if isinstance(bias, Node) and wide != channels:
            name, value = f"{bias.target}_padded", attribute(gm, str(bias.target)).detach()
            set_once(gm, name, lambda: padded(value, wide))
            bias = get(name)
        stores = get(f"{source}{SUFFIX}"), get(f"{layer.name}_scale")
        kernel = call(torch.ops.tfmq.float8_linear.default, (x.q, *stores, row_scale, bias, torch.float32))
    put_kernel(layer, kernel)
    if wide != channels:
        _cut(kernel, channels, wide)


def _weight(gm: GraphModule, weight: Node) -> tuple[str, Tensor, Tensor]:
    """Return the name of a weight's numbers, the numbers around zero, and their scales (C_out,)."""
    pair = dequantized(weight)
    if pair is not None:
        source, constant = str(pair.q.target), scale_nodes(pair.scale)[-1]
        return source, attribute(gm, source), attribute(gm, str(constant.target))
    q, scale, zero_point = integers_of(gm, weight)
    signed = centred(q, zero_point, 0)
    assert signed is not None
    (constant, *_) = weight.all_input_nodes
    return str(constant.target), signed.float(), scale


def _cut(kernel: Node, channels: int, wide: int) -> None:
    """Let the readers of a kernel read the first channels of those that it writes: the others are padding."""
    with kernel.graph.inserting_after(kernel):
        cut = kernel.graph.call_function(aten.slice.Tensor, (kernel, -1, 0, channels))
    cut.meta = {k: v for k, v in kernel.meta.items() if k == "val"}
    value = kernel.meta.get("val")
    if isinstance(value, Tensor):
        kernel.meta["val"] = value.new_empty((*value.shape[:-1], wide))
    kernel.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)
