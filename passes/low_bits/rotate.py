"""Spread outliers over blocks of channels by an orthogonal matrix and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.parallel import workers
from tfmq_fx.graph.channels import choose_layers, outgrow, record_changes, require_float_graph, set_tensor
from tfmq_fx.graph.nodes import aten, set_buffer
from tfmq_fx.graph.origins import Explicit, Origin, find_origins
from tfmq_fx.graph.state import Change, captured_of
from tfmq_fx.passes.pass_manager import CLEANING, declare
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, find_temporal


@declare(after=(*CLEANING, "smooth"))
@workers(1)  # on any number of threads the same bits
def rotate(
    gm: GraphModule,
    *,
    block: int = 16,
    temporal: TemporalBlock | None = None,
    max_memory: float = 8.0,
) -> PassResult:
    """Rotate the input channels of every layer outside the temporal block but the first and last.

    By block Hadamard matrices (QuaRot, Ashkboos et al. 2024):

        linear(x, W)   ==>   linear(x H, W H),   H = diag(H_b, .., H_b),   H H^T = 1

    For convolutions, H acts on the channels, at all kernel positions alike. The product x H is folded into
    the layer that produces x, if only views or attention over whole heads lie between and nothing else reads
    these channels. Elsewhere a reshape and a matmul by the constant H_b are inserted before the layers that
    read x. Reassociation only.

    block: b, a power of two. A layer is left as it is if b does not divide its input channels (of one group).
    max_memory: GiB; if the weights take more, the new ones on the CPU lie in temporary files, mapped to memory.

    The graph's state says what was done to each layer (`low_bits`); a graph that has it stays as it is.
    Raises TFMQError for a prepared graph and for another block size.
    """
    require_float_graph(gm, "rotate")
    h = hadamard(block)
    if "rotate" in captured_of(gm).low_bits:
        return PassResult(gm, False)
    temporal = temporal or find_temporal(gm)
    inside = temporal.nodes
    layers, changes = choose_layers(gm, inside, timestep=temporal.timestep)
    fits = {layer.node for layer in layers if not len(layer.by_input()) // layer.groups % block}
    for layer in layers:
        if layer.node not in fits:
            channels = len(layer.by_input()) // layer.groups
            reason = f"{channels} input channels are not divisible by {block}"
            changes.append(Change(name=layer.path, how="left", reason=reason))
    layers = [layer for layer in layers if layer.node in fits]
    mapped = outgrow(layers, max_memory)
    origins, explicit = find_origins(gm, layers, temporal=inside, block=block)
    for origin in origins:
        _fold(gm, origin, h, mapped=mapped)
        changes += [
            Change(name=layer.path, how="folded", reason=origin.words)
            for layer in layers
            if layer.node in origin.read
        ]
    for group in explicit:
        path = _insert(group, h)
        changes += [
            Change(name=layer.path, how="explicit", reason=group.reason, tensors=(path,))
            for layer in group.layers
        ]
    for layer in layers:
        rows = layer.by_input().double().unflatten(0, (-1, block))  # blocks, b, the rest
        set_tensor(gm, layer.path, layer.from_input((h.to(rows.device) @ rows).flatten(0, 1)), mapped=mapped)
    record_changes(gm, "rotate", changes)
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, bool(layers))


def hadamard(order: int) -> Tensor:
    """Return a symmetric orthogonal matrix of entries +-1 / sqrt(order), in float64.

    It is a Kronecker product of H_4 with equal row sums and, where needed, H_2 (such a product is a Hadamard
    matrix too). Equal row sums keep the mean of the channels from piling up in the block's first channel, as
    it does with Sylvester's matrices (ConvRot, 2025). Raises TFMQError for an order that is not a power of
    two.
    """
    if order < 2 or order & (order - 1):
        raise TFMQError(
            f"block={order}: is not a power of two; use 2, 4, 8, 16, ..., for which Hadamard matrices are built."
        )
    h, h2 = (
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64),
    )
    h4 = 1 - 2 * torch.eye(4, dtype=torch.float64).flip(0)
    while len(h) < order:
        h = torch.kron(h, h4 if order // len(h) >= 4 else h2)
    result: Tensor = h / order**0.5
    return result


def _fold(gm: GraphModule, origin: Origin, h: Tensor, *, mapped: bool) -> None:
    """Multiply the blocks' output channels of each producer by H^T."""
    blocks = torch.cat([v.unflatten(0, (-1, len(h))) for v in origin.read.values()]).unique(dim=0)
    for p in origin.producers:
        own = blocks[(blocks[:, 0] >= p.start) & (blocks[:, 0] < p.start + p.channels)] - p.start

        def change(rows: Tensor, own: Tensor = own) -> Tensor:
            rows = rows.clone()
            rows[own] = h.T.to(rows.device) @ rows[own]
            return rows

        p.rewrite(gm, change, mapped=mapped)


def _insert(group: Explicit, h: Tensor) -> str:
    """Insert x -> (.., C / b, b) @ H -> (.., C) before these layers, and return the path of H.

    The channels are moved to the end and back.
    """
    first, axis = group.layers[0], group.axis
    gm, name = first.gm, f"hadamard_{len(h)}"
    if name not in gm._buffers:
        set_buffer(gm, name, h.to(first.weight))
    y = group.x
    with gm.graph.inserting_before(first.node):
        call = gm.graph.call_function
        if axis != -1:
            y = call(aten.transpose.int, (y, axis, -1))
        y = call(aten.unflatten.int, (y, -1, [-1, len(h)]))
        y = call(aten.matmul.default, (y, gm.graph.get_attr(name)))
        y = call(aten.flatten.using_ints, (y, -2, -1))
        if axis != -1:
            y = call(aten.transpose.int, (y, axis, -1))
    y.meta = dict(group.x.meta)
    for layer in group.layers:
        layer.node.update_arg(0, y)
    return name
