"""Let a captured graph compute on another device.

    zeros = torch.ops.aten.zeros.default([4], device = device(type='cpu'))
    ->  zeros = torch.ops.aten.zeros.default([4], device = device(type='cuda', index=0))

Fake values say the new device, too. Buffers and parameters are not moved here: `Module.to` does. Bitwise unchanged on the same
device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree


def move_to_device(gm: GraphModule, *, device: torch.device) -> PassResult:
    """Replace every device argument of the graph's nodes, and of graphs in it, by `device`, in place."""
    modified = False
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        changed = False
        for node in module.graph.nodes:
            args, kwargs = (
                torch.fx.node.map_aggregate(part, lambda a: device if isinstance(a, torch.device) else a)
                for part in (node.args, node.kwargs)
            )
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs, changed = args, kwargs, True
            node.meta.update(
                {key: _moved(node.meta[key], device) for key in ("val", "example_value") if key in node.meta}
            )
        if changed:
            module.recompile()
        modified |= changed
    return PassResult(gm, modified)


def _moved(value: Any, device: torch.device) -> Any:
    """Return a fake value on another device."""

    def moved(x: FakeTensor) -> Any:
        if x.device == device:
            return x
        with x.fake_mode, enable_python_dispatcher():  # torch's own C++ would turn some sizes into constants
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    return pytree.tree_map_only(FakeTensor, moved, value)
