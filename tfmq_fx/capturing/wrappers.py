"""Leave out wrappers that only pass their arguments on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tfmq_fx.base.signatures import call_of, hides_arguments
from tfmq_fx.graph.written import keeps_buffers


@keeps_buffers
def unwrapped(network: nn.Module, example_inputs: Mapping[str, Any]) -> nn.Module:
    """Return the network in wrappers that pass all arguments on and return what they get, or the network itself.

    Whether a wrapper computes anything itself is seen by calling it once: DataParallel and averages of weights do not.
    """
    while hides_arguments(network) and (inner := _only_callee(network, example_inputs)) is not None:
        network = inner
    return network


@torch.no_grad()
def _only_callee(wrapper: nn.Module, example_inputs: Mapping[str, Any]) -> nn.Module | None:
    """Return the child that gets all the wrapper's arguments and makes all its outputs; None if there is none."""
    seen: list[tuple[nn.Module, Any, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((module, (args, kwargs), output))

    given = call_of(wrapper, pytree.tree_map(lambda x: x, dict(example_inputs)))
    handles = [m.register_forward_hook(keep, with_kwargs=True) for m in wrapper.children()]
    try:
        output = wrapper(*given[0], **given[1])
    except Exception:  # capture runs into it as well, and says why
        return None
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) == 1 and _same_tensors(seen[0][1], given) and _same_tensors(seen[0][2], output):
        return seen[0][0]
    return None


def _same_tensors(a: Any, b: Any) -> bool:
    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
