"""Make the timestep one value per sample, where the network takes a column of them."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.inputs import require_input
from tfmq_fx.graph.nodes import aten, fixed_size, meta_value


def flatten_timestep(gm: GraphModule, *, timestep: str) -> PassResult:
    """Take a timestep of shape (N, 1) or (N, 1, 1) as (N,): the graph reshapes it itself. Bitwise unchanged.

    The graph then takes both shapes. A timestep of another shape stays as it is.
    """
    node = require_input(gm, timestep)
    value = meta_value(node)
    if not isinstance(value, Tensor) or value.dim() < 2 or any(fixed_size(d) != 1 for d in value.shape[1:]):
        return PassResult(gm, False)
    with gm.graph.inserting_after(node):
        column = gm.graph.call_function(aten.reshape.default, (node, [-1, *[1] * (value.dim() - 1)]))
    column.meta = dict(node.meta)
    node.replace_all_uses_with(column, delete_user_cb=lambda user: user is not column)
    node.meta = {**node.meta, "val": value.reshape(value.shape[0])}
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)
