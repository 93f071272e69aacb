"""What of a network or its graph cannot be used is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tfmq_fx.base.ambient import has_values
from tfmq_fx.base.errors import TFMQError, nearest_names, require_type
from tfmq_fx.capturing.agreement import rows_of
from tfmq_fx.graph.inputs import placeholders, timestep_input
from tfmq_fx.graph.nodes import attribute, fixed_size, meta_value, schema_arguments


class FixedBatchError(TFMQError):
    """A network turns its batch into a number."""


def require_by_name(example: Mapping[str, Any]) -> None:
    """Raise TFMQError for example inputs that are not given by name."""
    require_type(example, Mapping, "example_inputs", "give forward's arguments by name, {'sample': x, ..}")


def require_timestep(timestep: str, found: Mapping[str, Any]) -> str:
    """Return the name `timestep`. Raises TFMQError unless the example input of that name is a tensor."""
    if timestep not in found:
        raise TFMQError(
            f"timestep={timestep!r}: not among the example inputs {nearest_names(timestep, found)}."
        )
    if not isinstance(found[timestep], Tensor):
        raise TFMQError(
            f"timestep={timestep!r}: a Python {type(found[timestep]).__name__} ({found[timestep]!r}) would be baked "
            "into the graph as a constant; give a tensor."
        )
    return timestep


def refuse_inference_parameters(network: nn.Module) -> None:
    """Raise TFMQError naming the first parameter or buffer that was made in inference_mode: export cannot take it."""
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        if p.is_inference():
            raise TFMQError(
                f"weight {name}: was made inside torch.inference_mode, and torch.export cannot capture such weights; "
                "build or load the network outside of it."
            )


def check_numbers(network: nn.Module) -> None:
    """Raise TFMQError naming the first parameter or buffer that holds NaN.

    Infinity has its uses outside weights: in masks.
    """
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        if _is_real(p) and torch.isnan(p).any():
            raise _not_finite(name)


def check_weights(gm: GraphModule) -> None:
    """Raise TFMQError naming the first weight, bias or running statistic of an operator that is not finite."""
    for node in gm.graph.nodes:
        for name, value in schema_arguments(node):
            if name in _WEIGHTS and isinstance(value, Node) and value.op == "get_attr":
                tensor = attribute(gm, str(value.target))
                if _is_real(tensor) and not torch.isfinite(tensor).all():
                    raise _not_finite(str(value.target))


_WEIGHTS = ("weight", "bias", "running_mean", "running_var")  # what aten's schemas call them


def _is_real(x: Tensor) -> bool:
    """Return True for floating-point numbers that are in memory."""
    return x.is_floating_point() and has_values(x)


def _not_finite(name: str) -> TFMQError:
    return TFMQError(f"weight {name}: holds NaN or infinite values; quantizing it would give wrong pictures.")


def require_dynamic_batch(gm: GraphModule, network: nn.Module, example: Mapping[str, Any]) -> None:
    """Raise TFMQError if an input's batch became a constant.

    Such a graph would fail, or be wrong, at any other batch size. example: the inputs of the capture, by flat
    name.
    """
    values = {n: node.meta["val"] for n, node in placeholders(gm).items()}
    sizes = {n: example[n].shape[0] for n in values if example[n].dim()}
    batch = sizes.get(timestep := str(timestep_input(gm, None).target), rows_of(example, timestep))
    for name, size in sizes.items():
        if size == batch and fixed_size(values[name].shape[0]) is not None:
            raise FixedBatchError(
                f"torch.export fixed the batch of {name!r} at {batch}: {type(network).__name__} turns it into a Python number, as "
                f"int({name}.shape[0]) does, or hard-codes it; use {name}.shape[0]. (If its first dimension is not a batch, give an "
                "example with another batch size.)"
            )
    of_batch = next((values[n].shape[0] for n, size in sizes.items() if size == batch), None)
    if isinstance(of_batch, torch.SymInt) and (node := _split_by_batch(gm, of_batch)) is not None:
        raise FixedBatchError(
            f"torch.export fixed the number of pieces of {node.name!r}: {type(network).__name__} splits "
            "its rows into pieces of a size, more for a larger batch; compute them at once."
        )


def _split_by_batch(gm: GraphModule, batch: torch.SymInt) -> Node | None:
    """Return a split into more pieces for a larger batch, of which the graph has as many as for the example's; None if there is none."""
    symbols = batch.node.expr.free_symbols

    def size(value: Any, times: int) -> int:
        value = meta_value(value) if isinstance(value, Node) else value
        if not isinstance(value, torch.SymInt):
            return int(value)
        hint: Any = value.node.hint
        return int(hint) * (times if value.node.expr.free_symbols & symbols else 1)

    def splits(node: Node) -> bool:
        given: tuple[Any, ...] = node.args
        x, each, *rest = given
        whole = meta_value(x).shape[rest[0] if rest else 0]
        return len({-(-size(whole, times) // size(each, times)) for times in (1, 2, 16)}) > 1

    found = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.split.Tensor)
    return next(filter(splits, found), None)
