"""Work with the observer nodes of a prepared graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from tfmq_fx.base._torchao import FakeQuantizeBase
from tfmq_fx.graph.nodes import fresh


def observers(gm: GraphModule) -> Iterator[tuple[Node, FakeQuantizeBase]]:
    """Yield the observer nodes of a prepared graph with their modules, each module once, in graph order."""
    seen = set()
    for node, module in observer_nodes(gm).items():
        if id(module) not in seen:
            seen.add(id(module))
            yield node, module


def observer_nodes(gm: GraphModule) -> dict[Node, FakeQuantizeBase]:
    """Return every node of a prepared graph that calls an observer, with its module, in graph order."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    called = {n: modules[str(n.target)] for n in gm.graph.nodes if n.op == "call_module"}
    return {n: module for n, module in called.items() if isinstance(module, FakeQuantizeBase)}


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
