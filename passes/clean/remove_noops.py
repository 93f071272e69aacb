"""Remove nodes that do nothing at inference: dropout in eval mode, identities, squeezes of nothing and metadata assertions."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import aten, called_module, fixed_size, meta_value, op_name, squeezed_dims

_ASSERTIONS = (aten._assert_tensor_metadata.default,)


def remove_noops(gm: GraphModule) -> PassResult:
    """Remove no-ops: dropout(x, p, train=False) ==> x; identity(x) ==> x; metadata assertions vanish.

    So does squeeze(x, dim) of a size that is fixed, and not one: other runtimes refuse it. Bitwise unchanged. Raises
    TFMQError for a dropout captured in train mode: its randomness would be baked into the graph.
    """
    modified = False
    for node in list(gm.graph.nodes):
        name = op_name(node)
        if name in ("dropout", "identity") and node.op in ("call_function", "call_module"):
            x, p, train = _dropout(node) if name == "dropout" else (node.args[0], 0.0, False)
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
        elif _takes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            modified = True
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def _dropout(node: Node) -> tuple[Any, Any, Any]:
    """Return x, p and train of a dropout function or module."""
    if node.op == "call_module":
        module = called_module(node)
        return node.args[0], module.p, module.training
    given = dict(zip(("x", "p", "train"), node.args, strict=False))
    return (
        given.get("x", node.kwargs.get("input")),
        given.get("p", node.kwargs.get("p")),
        given.get("train", node.kwargs.get("train", node.kwargs.get("training"))),
    )


def _takes_nothing(node: Node) -> bool:
    """Return True for a squeeze of sizes that are fixed, none of them one."""
    dims = squeezed_dims(node)
    return dims is not None and all(
        fixed_size(meta_value(node.args[0]).shape[d]) not in (None, 1)  # type: ignore[arg-type]
        for d in dims
    )
