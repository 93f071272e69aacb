"""Facts about int8 kernels in a graph, those of CPUs and of GPUs: which layers they take, and what they write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base import float8_kernels, int8_kernels
from tfmq_fx.base.arithmetic import centred
from tfmq_fx.base.onednn import onednn
from tfmq_fx.graph.float8 import dequantized
from tfmq_fx.graph.nodes import attribute, meta_value, op_name, set_buffer
from tfmq_fx.passes.int8.rescale_temporal import PRECISE

ops, tfmq = torch.ops.quantized_decomposed, torch.ops.tfmq
assert int8_kernels  # it defines the last two of `KERNELS`
assert float8_kernels
GPU_KERNELS = (tfmq.int8_conv2d.default, tfmq.int8_linear.default)
KERNELS = (
    onednn.qconv_pointwise.default,
    onednn.qlinear_pointwise.default,
    tfmq.int4_conv.default,
    tfmq.int4_linear.default,
    *GPU_KERNELS,
)
FLOAT8_KERNEL = tfmq.float8_linear.default
LAYER = "layer"  # in a kernel's meta: the names of the nodes that it replaced
FALLBACK = "fallback"  # in a layer's meta: why it stayed as it was


def arguments_of(kernel: Node) -> dict[str, Any]:
    """Return a kernel's arguments by the names of its schema."""
    assert isinstance(kernel.target, torch._ops.OpOverload)
    return dict(zip([a.name for a in kernel.target._schema.arguments], kernel.args, strict=True))


def set_arguments(kernel: Node, **new: Any) -> None:
    """Replace arguments of a kernel by the names of its schema."""
    kernel.args = tuple((arguments_of(kernel) | new).values())


def set_output(kernel: Node, *, dtype: torch.dtype, scale: float = 1.0, zero_point: int = 0) -> None:
    """Make a kernel write `dtype`: bytes with this scale and zero point, or floats."""
    at = _output_at(kernel)
    kernel.args = (*kernel.args[:at], scale, zero_point, dtype, *kernel.args[at + 3 :])


def output_dtype(kernel: Node) -> torch.dtype:
    """Return the dtype that a kernel writes."""
    dtype = kernel.args[_output_at(kernel) + 2]
    assert isinstance(dtype, torch.dtype)
    return dtype


def _output_at(kernel: Node) -> int:
    """Return where a kernel's arguments have the scale of its output; the zero point and the dtype follow."""
    return next(i for i, name in enumerate(arguments_of(kernel)) if name in ("output_scale", "y_scale"))


def why_not(gm: GraphModule, layer: Node, *, whose: str, dtype: torch.dtype) -> str:
    """Return why no int8 kernel can take a layer; "" if one can.

    whose: the kernels' maker, in the possessive. dtype: of the bytes that they read.
    """
    x, weight, bias, *rest = [*layer.args, None][: max(3, len(layer.args))]
    name = op_name(layer)
    if dequantized(x) is not None or dequantized(weight) is not None:
        return f"it multiplies float8_e4m3fn: {whose} kernels multiply bytes"
    if not isinstance(weight, Node) or weight.target is not ops.dequantize_per_channel.default:
        return f"its weight has scales per group: {whose} kernels take one per output channel"
    if not isinstance(x, Node) or x.target is not ops.dequantize_per_tensor.default:
        return f"its input has no constant scale: {whose} kernels take one per tensor"
    if x.args[5] != dtype:
        return f"its input is {x.args[5]}: {whose} kernels take {str(dtype).removeprefix('torch.')}"
    if "transpose" in name or name == "convolution":
        return f"torch has no int8 kernel of {whose} for {name}"
    if weight.args[3] != 0 or any(n.op != "get_attr" for n in weight.all_input_nodes):
        return "its weight is not a constant with one scale per output channel"
    if rest and isinstance(rest[1] if len(rest) > 1 else None, str):
        return f"its padding is {rest[1]!r}, not numbers"
    if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
        return "its bias is computed"
    if layer.kwargs:
        return f"its arguments {', '.join(layer.kwargs)} are given by name"
    rank = _rank(layer)
    if (name == "linear" and rank < 2) or (name != "linear" and rank != integers_of(gm, weight)[0].dim()):
        return "its input has no batch dimension"
    q, _, zero_point = integers_of(gm, weight)
    return "" if fits(q, zero_point) else "its weight minus its zero point does not fit a signed byte"


def fits(q: Tensor, zero_point: Tensor) -> bool:
    """Return True if a weight minus its zero points, one per output channel, fits signed bytes."""
    return centred(q, zero_point, 0) is not None


def _rank(layer: Node) -> int:
    value = meta_value(layer)
    assert isinstance(value, Tensor), layer
    return value.dim()


def integers_of(gm: GraphModule, weight: Node) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, scale and zero point of a weight."""
    q, scale, zero_point = (attribute(gm, str(a.target)) for a in weight.args[:3] if isinstance(a, Node))
    return q, scale, zero_point


def replace_layers(
    layers: Iterable[Node], why_not: Callable[[Node], str], replace: Callable[[Node], None]
) -> bool:
    """Replace layers by kernels, and return True if any was.

    why_not: returns why no kernel can take a layer, which its node's meta then says (FALLBACK); "" if one can.
    """
    modified = False
    for layer in layers:
        if reason := why_not(layer):
            layer.meta[FALLBACK] = reason
        else:
            replace(layer)
            modified = True
    return modified


def put_kernel(layer: Node, kernel: Node) -> None:
    """Let the users of a layer read its kernel, and erase the layer."""
    kernel.meta = {k: v for k, v in layer.meta.items() if k in ("val", PRECISE)} | {LAYER: (layer.name,)}
    layer.replace_all_uses_with(kernel)
    layer.graph.erase_node(layer)


def set_once(gm: GraphModule, target: str, make: Callable[[], Any]) -> None:
    """Make a buffer, unless another layer with the same weight has made it."""
    try:
        attribute(gm, target)
    except AttributeError:
        set_buffer(gm, target, make())
