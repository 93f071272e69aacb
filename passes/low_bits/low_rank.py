"""Split every weight into a low-rank part that stays in 16 bits and a residual that is quantized."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.arithmetic import IntegerRange, choose_qparams, dequantize_rows, quantize_rows, search_range
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.parallel import workers
from tfmq_fx.graph.channels import (
    ParameterLayer,
    choose_layers,
    outgrow,
    record_changes,
    require_float_graph,
    set_tensor,
)
from tfmq_fx.graph.nodes import aten, op_name, set_buffer
from tfmq_fx.graph.state import Change, captured_of
from tfmq_fx.passes.pass_manager import CLEANING, declare
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, find_temporal

STORED = torch.float16
_CONVOLUTIONS = {"conv1d": aten.conv1d, "conv2d": aten.conv2d, "conv3d": aten.conv3d}


@declare(after=(*CLEANING, "smooth", "rotate"))
@workers(1)  # on any number of threads the same bits
def low_rank(
    gm: GraphModule,
    *,
    rank: int = 16,
    bits: int | None = None,
    temporal: TemporalBlock | None = None,
    max_memory: float = 8.0,
) -> PassResult:
    """Add a branch of rank r to every layer outside the temporal block but the first and last.

    SVDQuant (Li et al. 2024):

        linear(x, W, b)   ==>   linear(x, W - L1 L2, b) + linear(linear(x, L2), L1)
        conv(x, W, b)     ==>   conv(x, W - L1 L2, b) + conv_1x1(conv(x, L2), L1)

    The branch reads x before any quantization and is kept in half precision. L1 and L2 are rounded to it
    first, and the residual of W is taken from the rounded ones, so that the sum is W. Reassociation only.

    bits: None takes the truncated SVD of W (SVDQuant): it leaves the smallest residual, so coarse activations
        do the least harm. A number is the bit width that the weights will have. It takes, layer by layer,
        either that SVD or the SVD of the rounding error W - Q(W) (LoftQ, Li et al. 2023, one alternation),
        whichever leaves a residual that rounds to nearest with less error.
    max_memory: GiB; if the weights take more, the new ones on the CPU lie in temporary files, mapped to memory.

    The graph's state says what was done to each layer (`low_bits`); a graph that has it stays as it is.
    Left as they are: grouped and transposed convolutions, and layers whose branch would hold as many
    numbers as the weight. Raises TFMQError for a prepared graph and a rank below 1.
    """
    require_float_graph(gm, "low_rank")
    if rank < 1:
        raise TFMQError(f"rank={rank}: is not positive.")
    if "low_rank" in captured_of(gm).low_bits:
        return PassResult(gm, False)
    temporal = temporal or find_temporal(gm)
    layers, changes = choose_layers(gm, temporal.nodes, timestep=temporal.timestep)
    mapped = outgrow(layers, max_memory)
    for layer in layers:
        out, *rest = layer.weight.shape
        numbers = rank * (out + torch.Size(rest).numel())
        if op_name(layer.node) not in ("linear", *_CONVOLUTIONS) or layer.groups > 1:
            reason = (
                f"a {'grouped ' if layer.groups > 1 else ''}{op_name(layer.node)} has no branch of this form"
            )
        elif numbers >= layer.weight.numel():
            reason = (
                f"a branch of rank {rank} would hold {numbers} numbers, the weight has {layer.weight.numel()}"
            )
        else:
            tensors = _split(gm, layer, rank, bits, mapped=mapped)
            changes.append(Change(name=layer.path, how="explicit", tensors=tensors))
            continue
        changes.append(Change(name=layer.path, how="left", reason=reason))
    record_changes(gm, "low_rank", changes)
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, any(change.tensors for change in changes))


def branch_weight(layer: Node) -> str | None:
    """Return the path of a branch layer's weight, which is stored in half precision and cast; else None."""
    cast = layer.args[1] if len(layer.args) > 1 else None
    if isinstance(cast, Node) and cast.target is aten.to.dtype and isinstance(source := cast.args[0], Node):
        return str(source.target) if source.op == "get_attr" and source.meta.get("low_rank") else None
    return None


def is_branch_sum(node: Node) -> bool:
    """Return True if this adds a branch to its layer. It looks like a residual connection, but is not one."""
    other = node.args[1] if len(node.args) > 1 else None
    return op_name(node) == "add" and isinstance(other, Node) and branch_weight(other) is not None


def _split(
    gm: GraphModule, layer: ParameterLayer, rank: int, bits: int | None, *, mapped: bool
) -> tuple[str, ...]:
    w_OK = layer.weight.double().flatten(1)
    l1, l2 = _factors(w_OK, rank)
    if bits is not None:
        other = _factors(_rounding_error(w_OK, bits), rank)
        left = [_rounding_error(w_OK - a.double() @ b.double(), bits).norm() for a, b in ((l1, l2), other)]
        if left[1] < left[0]:
            l1, l2 = other
    set_tensor(gm, layer.path, w_OK - l1.double() @ l2.double(), mapped=mapped)
    kernel = layer.weight.shape[2:]
    node, dtype = layer.node, layer.weight.dtype
    operator = node.target
    call = gm.graph.call_function
    with gm.graph.inserting_after(node):
        total = call(aten.add.Tensor, (node,))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    with gm.graph.inserting_before(total):
        weights = []
        for i, value in (2, l2.reshape(rank, -1, *kernel)), (1, l1.reshape(-1, rank, *[1] * len(kernel))):
            path = f"{layer.path}_low_rank_{i}"
            set_buffer(gm, path, value.contiguous())
            stored = gm.graph.get_attr(path)
            stored.meta["low_rank"] = True
            weights.append(call(aten.to.dtype, (stored, dtype)))
        assert callable(operator)
        # The branch has the layer's stride, padding and dilation, but no bias.
        given = {k: v for k, v in node.kwargs.items() if k != "bias"}
        inner = call(operator, (layer.x, weights[0], *([None, *node.args[3:]] if kernel else [])), given)
        outer = call(_CONVOLUTIONS[op_name(node)].default if kernel else operator, (inner, weights[1]))
    total.args = (node, outer)
    return f"{layer.path}_low_rank_1", f"{layer.path}_low_rank_2"


def _factors(w_OK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return L1 (O, r) and L2 (r, K) of the truncated SVD, with the singular values shared between them."""
    u, s, v = torch.linalg.svd(w_OK, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(STORED), (root[:, None] * v[:rank]).to(STORED)


def _rounding_error(w_OK: Tensor, bits: int) -> Tensor:
    """Return W - Q(W) for rounding to nearest as `prepare` does it."""
    integers = IntegerRange.weight(bits)
    w = w_OK.float()
    scale, zero_point = choose_qparams(*search_range(w, integers), integers)
    q = quantize_rows(w, scale, zero_point, integers)
    return w_OK - dequantize_rows(q, scale, zero_point, integers).double()
