"""Find the buffers that a network updates when it runs, and keep them as they are while it is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import attribute, meta_value, mutated_inputs, op_name, set_buffer, viewed_inputs

F = TypeVar("F", bound=Callable[..., Any])


def written_buffers(gm: GraphModule) -> dict[str, Tensor]:
    """Return the tensors that running the graph or a graph in it changes, by path: running means, caches of steps."""
    found: dict[str, Tensor] = {}
    for path, module in gm.named_modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                for target in _constants_under(mutated_inputs(node)):
                    found[f"{path}.{target}" if path else target] = attribute(module, target)
    return found


def writing_nodes(gm: GraphModule) -> list[Node]:
    """Return the nodes that change a value which the graph computed, or an input, in place: `x += y`."""
    return [
        n
        for n in gm.graph.nodes
        if op_name(n) != "detach" and any(not _constants_under([x]) for x in mutated_inputs(n))
    ]


def own_written_buffers(gm: GraphModule) -> None:
    """Give the graph copies of the buffers that it changes, so that the float network's stay as they are."""
    for path, value in written_buffers(gm).items():
        set_buffer(gm, path, value.detach().clone())


@contextmanager
def kept(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give these tensors the values back that they have now, on exit."""
    tensors = {name: value for name, value in tensors.items() if not _without_values(value)}
    before = {name: value.detach().clone() for name, value in tensors.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in tensors.items():
                if not torch.equal(value, before[name]):
                    value.copy_(before[name])


def _without_values(x: Tensor) -> bool:
    """Return True for a fake tensor, and a plain one on the meta device. Another subclass may have values there."""
    return isinstance(x, FakeTensor) or (x.is_meta and type(x) in (Tensor, nn.Parameter))


def keeps_buffers(function: F) -> F:
    """Let a function that runs its first argument, a graph or a network, leave its buffers as they are.

    Of a graph only those that it writes; of a network, all.
    """

    @functools.wraps(function)
    def wrapped(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graph = isinstance(network, GraphModule)
        with kept(written_buffers(network) if graph else dict(network.named_buffers())):  # type: ignore[arg-type]
            return function(network, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def frozen_buffers(gm: GraphModule, *, strict: bool) -> tuple[str, ...]:
    """Return a note on the buffers that a compiled form of the graph no longer updates, if there are any.

    Raises it as TFMQError if `strict`.
    """
    names = list(written_buffers(gm))
    if not names:
        return ()
    note = f"{', '.join(names)}: the network updates it at each call, a compiled one keeps its present value"
    if strict:
        raise TFMQError(f'strict: {note}; use engine="torch" with compile=False, or format="pt2".')
    return (note,)


def _constants_under(nodes: list[Node]) -> list[str]:
    """Return the targets of the constants that these nodes are, or are views of."""
    return [str(n.target) for n in roots(nodes) if n.op == "get_attr"]


def roots(nodes: list[Node]) -> Iterator[Node]:
    """Yield the nodes that hold the memory of these nodes: themselves, or what they are views of."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        viewed = [x for x in viewed_inputs(node) if not _casts(x, node)]
        if not viewed:
            yield node
        pending.extend(viewed)


def _casts(x: Node, y: Node) -> bool:
    """Return True if y has another dtype than x: `to` is a view only where it changes nothing."""
    before, after = meta_value(x), meta_value(y)
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype != after.dtype
