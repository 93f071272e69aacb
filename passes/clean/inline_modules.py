"""Replace calls of torch.nn modules by the functions they call, so that every weight is a node of the graph."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule, Node, Tracer
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.proxy import TraceError

from tfmq_fx.base._torchao import FakeQuantizeBase, ObserverBase
from tfmq_fx.graph.nodes import called_module, paste, put_in_place


class _NoLeaves(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return False


def inline_modules(gm: GraphModule) -> PassResult:
    """Inline torch.nn modules: y = self.proj(x) ==> y = linear(x, self.proj.weight, self.proj.bias).

    Bitwise unchanged. For graphs of torch.fx.symbolic_trace; those of torch.export have no such calls.
    Observers and graph modules (a temporal block) stay. So does a module whose forward symbolic tracing
    cannot follow: `prepare` reports its weights as float.
    """
    modified = False
    for node in gm.graph.find_nodes(op="call_module"):
        module = called_module(node)
        if isinstance(module, (GraphModule, FakeQuantizeBase, ObserverBase)):
            continue
        try:
            inner = _NoLeaves().trace(module)
        except (TraceError, TypeError, NotImplementedError):  # control flow on values: cannot be followed
            continue
        given = _bind(inner.find_nodes(op="placeholder"), node)
        with gm.graph.inserting_before(node):
            result = paste(gm.graph, inner, given, prefix=str(node.target))
        put_in_place(node, result)
        modified = True
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def _bind(inputs: list[Node], call: Node) -> dict[Node, Any]:
    """Return the traced module's placeholders -> the call's arguments, or their defaults."""
    given: dict[Node, Any] = {}
    for i, node in enumerate(inputs):
        default = node.args[0] if node.args else None
        given[node] = call.args[i] if i < len(call.args) else call.kwargs.get(str(node.target), default)
    return given
