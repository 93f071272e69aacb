"""Drop what does nothing at inference: dropout in eval mode and metadata assertions."""

from __future__ import annotations

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import aten, op_name

_ASSERTIONS = (aten._assert_tensor_metadata.default,)


def remove_noops(gm: GraphModule) -> PassResult:
    """dropout(x, p, train=False) ==> x, and metadata assertions vanish. Bitwise unchanged.

    Raises TFMQError for a dropout captured in train mode: its randomness would be baked into the graph.
    """
    modified = False
    for node in list(gm.graph.nodes):
        if op_name(node) == "dropout" and node.op == "call_function":
            x, p, train = (*node.args, *node.kwargs.values())[:3]
            if train and p != 0.0:
                raise TFMQError(
                    f"node {node.name}: dropout(p={p}) was captured in train mode; call .eval() on the network and capture again."
                )
            node.replace_all_uses_with(x)
            gm.graph.erase_node(node)
            modified = True
        elif node.target in _ASSERTIONS:
            gm.graph.erase_node(node)
            modified = True
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)
