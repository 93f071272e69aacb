"""Read the batch size from an input of the temporal block, so that the block needs no other input."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.inputs import conditioning_vectors, placeholders, timestep_input
from tfmq_fx.graph.nodes import aten, meta_value, op_name
from tfmq_fx.passes.pass_manager import declare

_FILLS = {"ones_like": 1, "new_ones": 1, "zeros_like": 0, "new_zeros": 0}


@declare(after=("bind_parameters",))
def root_batch_size(gm: GraphModule, *, timestep: str | None = None) -> PassResult:
    """Take the batch size from `timestep` where capture proved it to be the same symbol. Bitwise unchanged.

    If one timestep of shape () serves the whole batch, take it from the first conditioning vector instead.

        n = sym_size(sample, 0)          n = sym_size(timestep, 0)      (or Dynamo's input n, which stays unused)
        ones([n]) * timestep      ==>    ones([n]) * timestep
        ones_like(sample[:, 0])          full([n], 1)

    Networks broadcast a timestep to the batch by the sample's shape, so the block would depend on the sample,
    though only on its shape. A graph without shape metadata, or whose only such input is a scalar timestep,
    stays as it is.
    """
    source = timestep_input(gm, timestep)
    value = meta_value(source)
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        vectors = [placeholders(gm)[n] for n in conditioning_vectors(gm, str(source.target))]
        source = next((n for n in vectors if meta_value(n).dim() > 0), source)
        value = meta_value(source)
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() == 0
        or not isinstance(value.shape[0], torch.SymInt)
    ):
        return PassResult(gm, False)
    symbol = value.shape[0].node.expr

    def is_batch(size: object) -> bool:
        return isinstance(size, torch.SymInt) and size.node.expr == symbol

    queries = [
        n
        for n in gm.graph.find_nodes(op="call_function", target=aten.sym_size.int)
        if n.args != (source, 0) and is_batch(meta_value(n))
    ]
    sizes = [n for n in placeholders(gm).values() if n.users and is_batch(meta_value(n))]
    fills = [
        n
        for n in gm.graph.nodes
        if op_name(n) in _FILLS
        and isinstance(meta_value(n), torch.Tensor)
        and all(isinstance(d, int) or is_batch(d) for d in meta_value(n).shape)
    ]
    if not queries and not sizes and not fills:
        return PassResult(gm, False)
    call = gm.graph.call_function
    with gm.graph.inserting_after(list(placeholders(gm).values())[-1]):
        size = call(aten.sym_size.int, (source, 0))
        size.meta["val"] = value.shape[0]
    for node in queries:
        node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
    for node in sizes:
        node.replace_all_uses_with(size)
    for node in fills:
        like: torch.Tensor = meta_value(node)
        shape = [d if isinstance(d, int) else size for d in like.shape]
        with gm.graph.inserting_before(node):
            new = call(
                aten.full.default,
                (shape, _FILLS[op_name(node)]),
                {"dtype": like.dtype, "device": like.device},
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)
