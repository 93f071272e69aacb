"""Let a captured graph compute on another device.

    zeros = torch.ops.aten.zeros.default([4], device = device(type='cpu'))
    ->  zeros = torch.ops.aten.zeros.default([4], device = device(type='cuda', index=0))

Buffers and parameters are not moved here: `Module.to` does. Bitwise unchanged on the same device.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult


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
        if changed:
            module.recompile()
        modified |= changed
    return PassResult(gm, modified)
