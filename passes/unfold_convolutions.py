"""Write int8 convolutions as linears over patches, for runtimes whose bytes-to-float convolution is slow or missing."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph import aten, attribute, fixed_size, meta_value, op_name, set_buffer
from tfmq_fx.passes.pass_manager import declare

ops = torch.ops.quantized_decomposed
_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}  # name -> spatial dimensions
SUFFIX = "_patches"  # of the buffer that holds the weight as a matrix


@declare(after=("convert", "rescale_temporal", "byte_activations"))
def unfold_convolutions(gm: GraphModule) -> PassResult:
    """A quantized convolution of quantized x is a linear over its patches, which are copies of bytes.

        conv(dequantize(q, s, z), dequantize_per_channel(W, w_s, w_z), b)
          ==>
        p = cat([slice(pad(permute(q, to NHWC), z), at each place of the kernel)], -1)
        permute(linear(dequantize(p, s, z), dequantize_per_channel(W as (C_out, places * C_in), w_s, w_z), b), to NCHW)

    Numerics: the same products, summed in another order. The patches take as many times q's bytes as the kernel has
    places. A convolution stays as it is if it has groups, a scale per group of weights, or a size unknown at capture.
    """
    modified = False
    for module in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        for node in list(module.graph.nodes):
            if _fits(node):
                _unfold(module, node)
                modified = True
        if modified:
            module.graph.eliminate_dead_code()
            module.graph.lint()
            module.recompile()
    return PassResult(gm, modified)


def _arguments(node: Node) -> tuple[Any, Any, Any, list[int], list[int], list[int], int]:
    """x, weight, bias, stride, padding, dilation and groups of a conv1d, conv2d or conv3d."""
    n = _CONVOLUTIONS[op_name(node)]
    defaults: list[Any] = [None, None, None, 1, 0, 1, 1]
    given = [*node.args, *defaults[len(node.args) :]]
    x, weight, bias, *sizes, groups = given
    stride, padding, dilation = ([v] * n if isinstance(v, int) else list(v) * (n // len(v)) for v in sizes)
    return x, weight, bias, stride, padding, dilation, groups


def _fits(node: Node) -> bool:
    if op_name(node) not in _CONVOLUTIONS or node.kwargs or "padding" in str(node.target):
        return False
    x, weight, _, *_, groups = _arguments(node)
    is_int8 = (
        x.target is ops.dequantize_per_tensor.default and weight.target is ops.dequantize_per_channel.default
    )
    if not is_int8 or groups != 1 or weight.args[3] != 0 or weight.args[0].op != "get_attr":
        return False
    y = meta_value(node)
    return isinstance(y, Tensor) and y.dim() == _CONVOLUTIONS[op_name(node)] + 2 and None not in _spatial(y)


def _spatial(y: Tensor) -> list[int | None]:
    return [fixed_size(size) for size in y.shape[2:]]


def _unfold(gm: GraphModule, node: Node) -> None:
    call = gm.graph.call_function
    x, weight, bias, stride, padding, dilation, _ = _arguments(node)
    q, *qparams = x.args
    integers, *rows = weight.args
    w = attribute(gm, str(integers.target))
    places = list(itertools.product(*[range(k) for k in w.shape[2:]]))
    n, sizes = len(stride), _spatial(meta_value(node))
    name = f"{integers.target}{SUFFIX}"
    # (C_out, C_in, places) -> (C_out, places * C_in), as the patches lie in memory
    set_buffer(gm, name, w.flatten(2).movedim(1, 2).flatten(1).contiguous())
    with gm.graph.inserting_before(node):
        bytes_NHWC = call(aten.permute.default, (q, [0, *range(2, n + 2), 1]))
        if any(padding):
            around = [p for size in reversed(padding) for p in (size, size)]
            bytes_NHWC = call(aten.constant_pad_nd.default, (bytes_NHWC, [0, 0, *around], qparams[1]))
        patches = []
        for place in places:
            patch = bytes_NHWC
            for i, offset in enumerate(place):
                size = sizes[i]
                assert size is not None  # _fits
                start = offset * dilation[i]
                end = start + (size - 1) * stride[i] + 1
                patch = call(aten.slice.Tensor, (patch, i + 1, start, end, stride[i]))
            patches.append(patch)
        columns = patches[0] if len(places) == 1 else call(aten.cat.default, (patches, -1))
        x = call(x.target, (columns, *qparams))
        matrix = call(weight.target, (gm.graph.get_attr(name), *rows))
        y = call(aten.linear.default, (x, matrix, bias))
        value = call(aten.permute.default, (y, [0, n + 1, *range(1, n + 1)]))
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    gm.graph.erase_node(node)
