"""Let a captured graph compute on a device on which its weights do not lie.

    zeros = torch.ops.aten.zeros.default([4], device = device(type='cpu'))
    ->  zeros = torch.ops.aten.zeros.default([4], device = device(type='cuda', index=0))

    y = torch.ops.aten.linear.default(x, w)  ->  unchanged: w says that it is on the device (`Offloaded`), and the operator that
                                                 reads it gets a copy, which is freed after it

Vectors are moved to the device. Bitwise unchanged on a device that computes the same.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.offloaded import bring_back, home_of, offload
from tfmq_fx.passes.clean.move_to_device import move_to_device


def offload_weights(gm: GraphModule, *, device: torch.device) -> PassResult:
    """Offload a graph's matrices for computing on `device`, and move its vectors there, in place."""
    if all(x.device == device for x in (*gm.parameters(), *gm.buffers())):
        return PassResult(gm, False)
    offload(gm, device)
    move_to_device(gm, device=device)
    return PassResult(gm, True)


def return_weights(gm: GraphModule, *, device: torch.device) -> PassResult:
    """Let a graph compute on `device`, where its weights lie: the inverse of `offload_weights`, in place."""
    if all(x.device == home_of(x) == device for x in (*gm.parameters(), *gm.buffers())):
        return PassResult(gm, False)
    bring_back(gm, device)
    move_to_device(gm, device=device)
    return PassResult(gm, True)
