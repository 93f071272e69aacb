"""Work with the observer nodes of a prepared graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from tfmq_fx.base._torchao import FakeQuantizeBase
from tfmq_fx.graph.nodes import fresh


def observers(gm: GraphModule) -> Iterator[tuple[Node, FakeQuantizeBase]]:
    """Yield the observer nodes of a prepared graph with their modules, each module once, in graph order."""
    modules, seen = dict(gm.named_modules(remove_duplicate=False)), set()
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, FakeQuantizeBase) and id(module) not in seen:
                seen.add(id(module))
                yield node, module


def observer_nodes(gm: GraphModule) -> set[Node]:
    """Return the nodes of a prepared graph that call observers."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    return {
        n
        for n in gm.graph.nodes
        if n.op == "call_module" and isinstance(modules[str(n.target)], FakeQuantizeBase)
    }


def without_observers(gm: GraphModule) -> GraphModule:
    """Return the float function of a prepared graph: a copy in which every observer node is replaced by its input."""
    copy = fresh(gm)
    for node in observer_nodes(copy):
        node.replace_all_uses_with(node.all_input_nodes[0])
        copy.graph.erase_node(node)
    copy.recompile()
    return copy


def set_mode(observer: FakeQuantizeBase, *, observe: bool, quantize: bool) -> None:
    """Turn observing and fake quantization on or off."""
    observer.enable_observer(observe)
    observer.enable_fake_quant(quantize)
