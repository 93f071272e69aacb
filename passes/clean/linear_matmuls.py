"""Write products with a matrix of parameters as the linear layers that they are."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.constants import constants, parameters_under
from tfmq_fx.graph.nodes import aten, meta_value

_MATMULS = (aten.matmul.default, aten.mm.default)


def linear_matmuls(gm: GraphModule) -> PassResult:
    """Make products with parameters linear layers: matmul(x, w) ==> linear(x, t(w)). Bitwise unchanged.

    w: (C_in, C_out), a parameter or a function of parameters alone. Tables of numbers, such as the frequencies
    of a timestep's embedding, are no weights: what is computed from buffers alone stays a product, and so does
    one with a single row, which sums nothing. A graph without shape metadata stays as it is.
    """
    fixed, modified = constants(gm), False
    for node in list(gm.graph.nodes):
        if node.target not in _MATMULS or node.kwargs:
            continue
        x, w = node.args
        if (
            isinstance(x, Node)
            and x not in fixed
            and w in fixed
            and _is_matrix(w)
            and parameters_under(gm, w)
        ):
            with gm.graph.inserting_before(node):
                rows = gm.graph.call_function(aten.t.default, (w,))
                layer = gm.graph.call_function(aten.linear.default, (x, rows))
            rows.meta = {**w.meta, "val": meta_value(w).t()}
            layer.meta = dict(node.meta)
            node.replace_all_uses_with(layer)
            gm.graph.erase_node(node)
            modified = True
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def _is_matrix(node: Node) -> bool:
    value = meta_value(node)
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] > 1 and value.is_floating_point()
