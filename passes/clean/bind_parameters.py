"""Turn parameters that a graph takes as inputs into its own again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fresh, set_buffer
from tfmq_fx.graph.state import captured_of, set_state


def bind_parameters(gm: GraphModule, *, example_inputs: Sequence[Any]) -> PassResult:
    """Bind inputs that are parameters or buffers: placeholder weight ==> get_attr weight. Bitwise unchanged.

    For graphs of a torch.compile backend, which lift the network's parameters to inputs. The result is a new
    graph module, because the compiler goes on using the one it gave; it takes only the inputs at the positions
    `captured_of(gm).inputs`, in this order.

    Raises TFMQError when the number of example inputs is not the number of the graph's inputs.
    """
    gm = fresh(gm)
    nodes = list(placeholders(gm).values())
    if len(nodes) != len(example_inputs):
        raise TFMQError(
            f"example_inputs: {len(example_inputs)} given, the graph takes {len(nodes)}; give one for each."
        )
    kept = []
    for i, (node, value) in enumerate(zip(nodes, example_inputs, strict=True)):
        if not _is_static(value):
            kept.append(i)
            continue
        _set(gm, node.name, value)
        with gm.graph.inserting_before(node):
            own = gm.graph.get_attr(node.name)
        own.meta = dict(node.meta)
        node.replace_all_uses_with(own)
        gm.graph.erase_node(node)
    set_state(gm, dataclasses.replace(captured_of(gm), inputs=tuple(kept)))
    if len(kept) == len(nodes):
        return PassResult(gm, False)
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


def _is_static(value: Any) -> bool:
    """Return True for a parameter, and for a tensor that Dynamo marked as a module's own (a buffer)."""
    return isinstance(value, nn.Parameter) or (
        isinstance(value, Tensor) and hasattr(value, "_dynamo_static_input_type")
    )


def _set(gm: GraphModule, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        gm.register_parameter(name, value)
    else:
        set_buffer(gm, name, value)
