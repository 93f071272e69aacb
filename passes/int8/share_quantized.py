"""Quantize a tensor once for all its readers, and not at all if an int8 kernel can write the bytes itself."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten
from tfmq_fx.passes.int8.kernels import KERNELS, output_dtype, set_output
from tfmq_fx.passes.int8.rescale_temporal import PRECISE
from tfmq_fx.passes.pass_manager import declare

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_BYTES = ((0, 255, torch.uint8), (-128, 127, torch.int8))
# They move values without computing, and torch supports them for bytes.
MOVES = (
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.flatten.using_ints, aten.clone.default, aten.contiguous.default, aten.expand.default, aten.slice.Tensor,
)  # fmt: skip


@declare(after=("onednn_kernels", "cuda_kernels", "fuse_epilogues"))
def share_quantized(gm: GraphModule) -> PassResult:
    """Merge equal quantizations of one tensor, and fold one that alone reads a kernel into the kernel.

        quantize(x, s, z), quantize(x, s, z)            ==>  one of them
        quantize(view(kernel(..., float32)), s, z)      ==>  view(kernel(..., s, z, uint8)), or int8

    Numerics: the kernel rounds the same float32 value to the nearest integer: bitwise unchanged except at
    ties.
    """
    shared = _merge(gm)
    folded = sum(_fold(node) for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE))
    if shared or folded:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(shared or folded))


def _merge(gm: GraphModule) -> int:
    """Replace quantizations by the first equal one, and return how many.

    find_nodes walks in the order of the graph, so the first one precedes all their readers.
    """
    first: dict[tuple[object, ...], Node] = {}
    merged = 0
    for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE):
        other = first.setdefault(node.args, node)
        if other is not node:
            node.replace_all_uses_with(other)
            gm.graph.erase_node(node)
            merged += 1
    return merged


def _fold(quantize: Node) -> bool:
    """Make the kernel before a quantization write its bytes, and return True if that is possible."""
    source, scale, zero_point, low, high, dtype = quantize.args
    assert isinstance(source, Node)
    x = source
    while x.target in MOVES and len(x.users) == 1 and isinstance(x.args[0], Node):
        x = x.args[0]
    alone = len(x.users) == 1 and x.target in KERNELS and not x.meta.get(PRECISE)
    if not alone or (low, high, dtype) not in _BYTES or output_dtype(x) != torch.float32:
        return False
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    assert isinstance(dtype, torch.dtype)
    set_output(x, dtype=dtype, scale=scale, zero_point=zero_point)
    quantize.replace_all_uses_with(source)
    node = source
    while True:  # their fake values still say float32
        if "val" in node.meta:
            node.meta["val"] = node.meta["val"].to(dtype)
        if node is x:
            break
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return True
