"""Replace dtypes that a graph takes from other tensors by literals, so that it no longer needs these."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten, meta_value

_CASTS = (aten.type_as.default, aten.to.other)


def literal_dtypes(gm: GraphModule) -> PassResult:
    """Make dtypes literal where capture knows them: type_as(x, sample) ==> to(x, float32). Bitwise unchanged.

    A graph's dtypes and devices are fixed when it is captured. So a cast to another tensor's dtype says no
    more than a literal, but makes the temporal block need that tensor. Graphs without fake values stay as
    they are.
    """
    modified = False
    for node in list(gm.graph.nodes):
        if node.target not in _CASTS:
            continue
        x, like = meta_value(node.args[0]), meta_value(node.args[1])
        if isinstance(x, torch.Tensor) and isinstance(like, torch.Tensor) and x.device == like.device:
            with gm.graph.inserting_before(node):
                cast = gm.graph.call_function(aten.to.dtype, (node.args[0], like.dtype))
            cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast)
            gm.graph.erase_node(node)
            modified = True
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)
