"""Hide batch norms from torchao for a while."""

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
    """Give batch norms another target, for a while: all, or those alone that are no part of the layer before them.

    torchao folds every batch norm into the weight of its layer, also where something else reads the layer's output or
    its weight, which then is another. And where it meets one that is left, it looks for 96 patterns of training, each of
    which it traces first: half a minute.
    """
    reads = Counter(str(n.target) for n in gm.graph.find_nodes(op="get_attr") for _ in n.users)
    for target, hidden in _HIDDEN.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            layer = node.args[0]
            weights = [str(n.target) for n in layer.all_input_nodes if n.op == "get_attr"]
            if not shared_alone or len(layer.users) > 1 or any(reads[w] > 1 for w in weights):
                node.target = hidden


def show_batch_norms(gm: GraphModule) -> None:
    for target, hidden in _HIDDEN.items():
        for node in gm.graph.find_nodes(op="call_function", target=hidden):
            node.target = target
    gm.recompile()
