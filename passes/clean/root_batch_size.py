"""Read the batch size from an input of the temporal block, so that the block needs no other input."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
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
    source = _source(gm, timestep)
    value = meta_value(source)
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() == 0
        or not isinstance(value.shape[0], torch.SymInt)
    ):
        return PassResult(gm, False)
    queries, sizes, fills = _readers(gm, source, value.shape[0].node.expr)
    if not queries and not sizes and not fills:
        return PassResult(gm, False)
    with gm.graph.inserting_after(list(placeholders(gm).values())[-1]):
        size = gm.graph.call_function(aten.sym_size.int, (source, 0))
        size.meta["val"] = value.shape[0]
    for node in (*queries, *sizes):
        node.replace_all_uses_with(size)
    for node in queries:
        gm.graph.erase_node(node)
    for node in fills:
        _fill(gm, node, size)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


def _source(gm: GraphModule, timestep: str | None) -> Node:
    """Return the timestep; if it has shape (), the first conditioning vector, if there is one."""
    source = timestep_input(gm, timestep)
    value = meta_value(source)
    if not isinstance(value, torch.Tensor) or value.dim() > 0:
        return source
    vectors = [placeholders(gm)[n] for n in conditioning_vectors(gm, str(source.target))]
    return next((n for n in vectors if meta_value(n).dim() > 0), source)


def _readers(gm: GraphModule, source: Node, symbol: object) -> tuple[list[Node], list[Node], list[Node]]:
    """Return what has the batch size from elsewhere: queries of shapes, inputs that are sizes, and tensors filled with one number."""

    def is_batch(size: object) -> bool:
        return isinstance(size, torch.SymInt) and size.node.expr == symbol

    def is_fill(node: Node) -> bool:
        value = meta_value(node)
        known = op_name(node) in _FILLS and isinstance(value, torch.Tensor)
        return known and all(isinstance(d, int) or is_batch(d) for d in value.shape)

    queries = gm.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    return (
        [n for n in queries if n.args != (source, 0) and is_batch(meta_value(n))],
        [n for n in placeholders(gm).values() if n.users and is_batch(meta_value(n))],
        [n for n in gm.graph.nodes if is_fill(n)],
    )


def _fill(gm: GraphModule, node: Node, size: Node) -> None:
    """Make the tensor from its sizes and its number."""
    like: torch.Tensor = meta_value(node)
    shape = [d if isinstance(d, int) else size for d in like.shape]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(
            aten.full.default,
            (shape, _FILLS[op_name(node)]),
            {"dtype": like.dtype, "device": like.device},
        )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
