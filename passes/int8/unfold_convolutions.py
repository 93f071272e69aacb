"""Rewrite int8 convolutions as linears over patches, for runtimes without fast bytes-to-float convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import (
    aten,
    attribute,
    convolution_arguments,
    fixed_size,
    meta_value,
    op_name,
    set_buffer,
)
from tfmq_fx.passes.pass_manager import declare, rewrite_modules

ops = torch.ops.quantized_decomposed
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
SUFFIX = "_patches"  # of the buffer that holds the weight as a matrix


@declare(after=("convert", "rescale_temporal", "byte_activations"))
def unfold_convolutions(gm: GraphModule) -> PassResult:
    """Replace a quantized convolution of quantized x by a linear over its patches, which are copies of bytes.

        conv(dequantize(q, s, z), dequantize_per_channel(W, w_s, w_z), b)
          ==>
        p = index_select(pad(permute(q, to NHWC), z) as (N, H * W, C_in), 1, what each place of the kernel sees)
        permute(linear(dequantize(p, s, z), dequantize_per_channel(W as (C_out, places * C_in), w_s, w_z), b), to NCHW)

    Numerics: the same products, summed in another order. The patches take q's bytes times the number of
    places of the kernel. A convolution stays as it is if it has groups, a scale per group of weights, or a
    size unknown at capture.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    for node in list(module.graph.nodes):
        if _fits(node):
            _unfold(module, node)
            modified = True
    return modified


def _fits(node: Node) -> bool:
    if op_name(node) not in _CONVOLUTIONS or node.kwargs or "padding" in str(node.target):
        return False
    given = convolution_arguments(node)
    x, weight = given["input"], given["weight"]
    is_int8 = (
        x.target is ops.dequantize_per_tensor.default and weight.target is ops.dequantize_per_channel.default
    )
    if not is_int8 or given["groups"] != 1 or weight.args[3] != 0 or weight.args[0].op != "get_attr":
        return False
    y, seen = meta_value(node), meta_value(x)
    known = isinstance(y, Tensor) and isinstance(seen, Tensor) and y.dim() == len(given["stride"]) + 2
    return known and None not in (_spatial(y) + _spatial(seen))


def _spatial(y: Tensor) -> list[Any]:
    """Return the sizes after batch and channels, with None for one that may vary."""
    return [fixed_size(size) for size in y.shape[2:]]


def _places(padded: list[int], kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """Return indices into the flattened, padded picture.

    For every output, in order, they give what each place of the kernel sees.
    """
    cells = torch.arange(math.prod(padded), dtype=torch.int32).reshape(padded)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        # Outputs stay in place; what the kernel sees of this dimension goes to the end.
        cells = cells.unfold(i, (k - 1) * d + 1, s)[..., ::d]
    return cells.flatten().contiguous()


def _unfold(gm: GraphModule, node: Node) -> None:
    call = gm.graph.call_function
    given = convolution_arguments(node)
    x, weight, bias = (given[name] for name in ("input", "weight", "bias"))
    stride, padding, dilation = (given[name] for name in ("stride", "padding", "dilation"))
    q, *qparams = x.args
    integers, *weight_qparams = weight.args
    w = attribute(gm, str(integers.target))
    kernel = list(w.shape[2:])
    places = math.prod(kernel)
    n, sizes = len(stride), _spatial(meta_value(node))
    name = f"{integers.target}{SUFFIX}"
    # (C_out, C_in, places) -> (C_out, places * C_in), as the patches lie in memory
    set_buffer(gm, name, w.flatten(2).movedim(1, 2).flatten(1).contiguous())
    with gm.graph.inserting_before(node):
        columns = call(aten.permute.default, (q, [0, *range(2, n + 2), 1]))
        if any(padding):
            around = [p for size in reversed(padding) for p in (size, size)]
            columns = call(aten.constant_pad_nd.default, (columns, [0, 0, *around], qparams[1]))
        if places > 1 or any(size > 1 for size in stride):
            padded = [size + 2 * p for size, p in zip(_spatial(meta_value(x)), padding, strict=True)]
            geometry = "_".join("x".join(map(str, part)) for part in (padded, kernel, stride, dilation))
            index = f"patches_{geometry}"
            set_buffer(gm, index, _places(padded, kernel, stride, dilation))
            rows = call(aten.reshape.default, (columns, [-1, math.prod(padded), w.shape[1]]))
            rows = call(aten.index_select.default, (rows, 1, gm.graph.get_attr(index)))
            columns = call(aten.reshape.default, (rows, [-1, *sizes, places * w.shape[1]]))
        x = call(x.target, (columns, *qparams))
        matrix = call(weight.target, (gm.graph.get_attr(name), *weight_qparams))
        y = call(aten.linear.default, (x, matrix, bias))
        value = call(aten.permute.default, (y, [0, n + 1, *range(1, n + 1)]))
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    gm.graph.erase_node(node)
