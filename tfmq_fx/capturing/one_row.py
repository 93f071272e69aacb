"""Let a captured graph return of a single row what its network does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tfmq_fx.base.ambient import has_values
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.row_lists import run
from tfmq_fx.capturing.agreement import alike, as_dict, rows_of
from tfmq_fx.graph.inputs import placeholders, timestep_input
from tfmq_fx.graph.nodes import add_call, aten, fixed_size, meta_value
from tfmq_fx.graph.written import keeps_buffers


@keeps_buffers
@torch.no_grad()
def return_one_row(
    gm: GraphModule, network: nn.Module, inputs: Mapping[str, Any], *, share: float = 1.0
) -> None:
    """Squeeze the batch of a graph's outputs that the network returns without it for a single row, as `return x.squeeze()` does.

    For a graph that `keep_batch` changed, which computes a single row as each of several. A network that does not take one is
    not compared. inputs: the network's arguments, of several rows. share: see `agree`.

    Raises TFMQError if the graph computes something else of one row than the network.
    """
    one = _first_row(gm, inputs)
    try:
        expected = pytree.tree_leaves(as_dict(run(network, one)))
    except Exception:  # of any type
        return
    found = {n: x for n, (_, x) in leaves(one).items()}
    try:
        made = pytree.tree_leaves(gm(*[found[n] for n in placeholders(gm)]))
        same = _same(_squeezed(gm, made, expected), expected, share=share)
    except Exception:  # of any type: the graph does not take one row, or has other outputs
        same = False
    if not same:
        raise TFMQError(
            f"{type(network).__name__}: computes something else of one row than of each of several, and squeezes the batch of a single "
            "row; name the dimensions that squeeze is to take, as x.squeeze(1) does."
        )


def _same(made: Sequence[Any], expected: Sequence[Any], *, share: float) -> bool:
    """Return `alike`, of outputs that are not finite in shape alone: the example's first row may have a noise level of 0."""
    pairs = [(a, b) for a, b in zip(made, expected, strict=True) if isinstance(b, Tensor)]
    finite = [(a, b) for a, b in pairs if not has_values(b) or bool(b.isfinite().all())]
    return all(a.shape == b.shape for a, b in pairs) and all(alike([a], [b], share=share) for a, b in finite)


def _first_row(gm: GraphModule, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with the first row alone."""
    rows = rows_of(inputs, str(timestep_input(gm, None).target))
    found = {n: x for n, (_, x) in leaves(inputs).items() if isinstance(x, Tensor)}
    of_rows = [found[n] for n, node in placeholders(gm).items() if 0 in _open_dims(node)]
    cut = {id(x) for x in of_rows if len(x) == rows}
    return {n: pytree.tree_map(lambda y: y[:1] if id(y) in cut else y, x) for n, x in inputs.items()}


def _squeezed(gm: GraphModule, made: Sequence[Any], expected: Sequence[Any]) -> list[Any]:
    """Return the outputs without their batch of one where the network's have none, and let the graph return them so."""
    output = gm.graph.output_node()
    nodes, spec = pytree.tree_flatten(output.args[0], is_leaf=lambda x: isinstance(x, Node))
    found = list(made)
    for i, (node, a, b) in enumerate(zip(nodes, made, expected, strict=True)):
        dims = [d for d in _open_dims(node) if a.shape[d] == 1] if isinstance(node, Node) else []
        if not dims or not isinstance(b, Tensor) or a.squeeze(dims).shape != b.shape:
            continue
        with gm.graph.inserting_before(output):
            if a.squeeze().shape == b.shape and dims == _open_dims(node):
                # ONNX has no operator that takes a dimension only if it is one.
                nodes[i] = add_call(gm.graph, aten.squeeze.default, node)
            else:
                nodes[i] = add_call(gm.graph, aten.squeeze.dims, node, dims)
        found[i] = a.squeeze(dims)
    output.args = (pytree.tree_unflatten(nodes, spec),)
    gm.recompile()
    return found


def _open_dims(node: Node) -> list[int]:
    """Return the dimensions of a node's tensor whose sizes may vary."""
    value = meta_value(node)
    return (
        [i for i, d in enumerate(value.shape) if fixed_size(d) is None] if isinstance(value, Tensor) else []
    )
