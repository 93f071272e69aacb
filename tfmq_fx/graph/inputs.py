"""Find the inputs of a graph: its placeholders, the timestep, and what may join it in the temporal block."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.graph.nodes import fixed_size, hinted_shape, meta_value
from tfmq_fx.graph.state import captured_of

# Bytes. glibc maps larger tensors anew each time: on a UNet of 128 x 128, 16 rows at once took three times as long as
# 2 at once, two thirds of it in the kernel.
LARGEST = 2**24


def placeholders(gm: GraphModule) -> dict[str, Node]:
    """Return input name -> placeholder, in the order of the graph."""
    return {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}


def require_input(gm: GraphModule, name: str, *, argument: str = "timestep") -> Node:
    """Return the placeholder called `name`. Raises TFMQError with the nearest names when there is none.

    argument: the caller's argument that holds the name, for the message.
    """
    inputs = placeholders(gm)
    if name not in inputs:
        raise TFMQError(
            f"{argument}={name!r}: the graph has no such input; its inputs are {nearest_names(name, inputs)}."
        )
    return inputs[name]


def timestep_input(gm: GraphModule, name: str | None) -> Node:
    """Return the placeholder of the timestep.

    It is the first of these: `name`, the input that capture recorded, "timestep", the only input that can be
    it. Raises TFMQError for an unknown name, and without a name when no input or several have shape () or
    (N,).
    """
    known, inputs = captured_of(gm), placeholders(gm)
    name = name or known.timestep
    if name is None:
        name = choose_timestep({n: meta_value(node) for n, node in inputs.items()})
    return require_input(gm, name)


def fixed_batch(gm: GraphModule, shared: Collection[str]) -> int | None:
    """Return the only batch size that the graph takes; None if it takes any.

    shared: names of the inputs that have no rows.
    """
    values = [meta_value(n) for name, n in placeholders(gm).items() if name not in shared]
    sizes = [fixed_size(x.shape[0]) for x in values if isinstance(x, Tensor) and x.dim()]
    return next((s for s in sizes if s is not None), None)


def rows_at_once(gm: GraphModule, batch_size: int, shared: Collection[str]) -> int:
    """Return how many of a batch's rows to run at once: on a CPU, as many as keep each tensor below LARGEST bytes.

    shared: names of the inputs that have no rows.
    """
    on_cpu = all(x.device.type == "cpu" for x in (*gm.parameters(), *gm.buffers()))
    if not on_cpu or fixed_batch(gm, shared):
        return batch_size
    return min(batch_size, max(1, LARGEST // max(1, largest_row(gm))))


def largest_row(gm: GraphModule) -> int:
    """Return the bytes that a row of the batch has in the largest tensor of a graph; 0 for a graph without shapes."""
    changing = [n for n in gm.graph.nodes if any(fixed_size(d) is None for d in _sizes(n))]
    if not changing:
        return 0
    first, shape = _sizes(changing[0]), hinted_shape(changing[0])  # an input
    rows = next(hint for hint, d in zip(shape, first, strict=True) if fixed_size(d) is None)
    most: int = max(math.prod(hinted_shape(n)) * meta_value(n).element_size() for n in changing)
    return most // rows


def _sizes(node: Node) -> Sequence[int | torch.SymInt]:
    value = meta_value(node)
    return value.shape if isinstance(value, Tensor) else ()


def choose_timestep(values: Mapping[str, Any]) -> str:
    """Return the input that can be the timestep when none is named.

    It is "timestep", or the only tensor of shape () or (N,). Raises TFMQError when there is no such input or
    several.
    """
    if "timestep" in values:
        return "timestep"
    candidates = [n for n, x in values.items() if isinstance(x, Tensor) and x.dim() <= 1]
    if len(candidates) != 1:
        found = f"{' and '.join(candidates)} could be it" if candidates else "no input has shape () or (N,)"
        raise TFMQError(
            f"timestep: not named, and {found}; name it with timestep=... Inputs are {', '.join(values)}."
        )
    return candidates[0]


def conditioning_vectors(gm: GraphModule, timestep: str) -> list[str]:
    """Return the inputs that hold one number or vector per sample: (), (N,) or (N, F).

    N is the timestep's batch. Inputs with more dimensions (pixels, tokens), another first dimension (position
    ids), or the shape of the output are data. All inputs are data when none would be otherwise, and in a
    graph without shapes.
    """
    values = {name: meta_value(node) for name, node in placeholders(gm).items()}
    batch = values.pop(timestep)
    leaves = pytree.tree_leaves(gm.graph.output_node().args[0], is_leaf=lambda x: isinstance(x, Node))
    output = next((v for n in leaves if isinstance(n, Node) and isinstance(v := meta_value(n), Tensor)), None)
    tensors = {n: x for n, x in values.items() if isinstance(x, Tensor)}
    if not isinstance(batch, Tensor) or output is None:
        return []
    found = [
        name
        for name, x in tensors.items()
        if x.dim() <= 2
        and [str(d) for d in x.shape] != [str(d) for d in output.shape]
        and (x.dim() == 0 or batch.dim() == 0 or _may_be(x.shape[0], batch.shape[0]))
    ]
    return found if len(found) < len(tensors) else []


def _may_be(size: int | torch.SymInt, batch: int | torch.SymInt) -> bool:
    """Return True if a dimension looks like the batch in the capture: it may vary and had the same size."""
    if fixed_size(size) is not None or not isinstance(batch, torch.SymInt):
        return str(size) == str(batch)
    return bool(size.node.hint == batch.node.hint)  # type: ignore[union-attr]
