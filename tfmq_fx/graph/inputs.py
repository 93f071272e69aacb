"""What a graph takes: its placeholders, the timestep among them, and what may join it in the temporal block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.graph.nodes import fixed_size, meta_value
from tfmq_fx.graph.state import captured_of


def placeholders(gm: GraphModule) -> dict[str, Node]:
    return {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}


def require_input(gm: GraphModule, name: str, *, argument: str = "timestep") -> Node:
    """The placeholder called `name`. Raises TFMQError with the nearest names when there is none."""
    inputs = placeholders(gm)
    if name not in inputs:
        raise TFMQError(
            f"{argument}={name!r}: the graph has no such input; its inputs are {nearest_names(name, inputs)}."
        )
    return inputs[name]


def timestep_input(gm: GraphModule, name: str | None) -> Node:
    """The placeholder of the timestep: `name`; or what capture recorded; or "timestep"; or the one that can be it.

    Raises TFMQError for an unknown name, and for no name when none or several inputs of shape () or (N,) are there.
    """
    name = name or captured_of(gm).timestep
    inputs = placeholders(gm)
    if name is None:
        name = choose_timestep({n: meta_value(node) for n, node in inputs.items()})
    return require_input(gm, name)


def choose_timestep(values: Mapping[str, Any]) -> str:
    """The one input that can be the timestep when none is named: "timestep", or the only tensor of shape () or (N,)."""
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
    """Inputs that hold one number or vector per sample: (), (N,) or (N, F), N being the timestep's batch.

    What has more dimensions (pixels, tokens), another first dimension (position ids), or the shape of the
    output is data. So is everything when nothing else would be, and in a graph without shapes.
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
    """Whether a dimension is the batch, as far as capture could see: it may vary, and had the same size."""
    if fixed_size(size) is not None or not isinstance(batch, torch.SymInt):
        return str(size) == str(batch)
    return bool(size.node.hint == batch.node.hint)  # type: ignore[union-attr]
