"""Hide batch norms from torchao's prepare and convert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule


def _batch_norm(*args: Any) -> Any:
    return torch.ops.aten.batch_norm.default(*args)


def _native_batch_norm(*args: Any) -> Any:
    return torch.ops.aten._native_batch_norm_legit_no_training.default(*args)


_HIDDEN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.batch_norm.default: _batch_norm,
    torch.ops.aten._native_batch_norm_legit_no_training.default: _native_batch_norm,
}


def hide_batch_norms(gm: GraphModule, *, shared_alone: bool = False) -> None:
    """Replace the targets of batch norms, so that torchao does not recognise them; `show_batch_norms` undoes it.

    torchao folds every batch norm into the weight of the layer before it, even if something else reads the
    layer's output or its weight, and would then see other values. Where it finds a batch norm that is left, it
    matches 96 training patterns and traces each of them first, which takes half a minute.

    shared_alone: True hides only those that must not be folded, because something else reads the output or the
        weight of the layer; False hides all.
    """
    reads = Counter(str(n.target) for n in gm.graph.find_nodes(op="get_attr") for _ in n.users)
    for target, hidden in _HIDDEN.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            layer = node.args[0]
            weights = [str(n.target) for n in layer.all_input_nodes if n.op == "get_attr"]
            if not shared_alone or len(layer.users) > 1 or any(reads[w] > 1 for w in weights):
                node.target = hidden


def show_batch_norms(gm: GraphModule) -> None:
    """Restore the targets that `hide_batch_norms` replaced."""
    for target, hidden in _HIDDEN.items():
        for node in gm.graph.find_nodes(op="call_function", target=hidden):
            node.target = target
    gm.recompile()
