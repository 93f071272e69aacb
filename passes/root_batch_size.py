"""Read the batch size from `timestep`, so that the temporal block needs no other input."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph import aten, require_input


def root_batch_size(gm: GraphModule, *, timestep: str = "timestep") -> PassResult:
    """Replace sym_size(x, d) by sym_size(timestep, 0) where export proved both to be one symbol. Bitwise unchanged.

        n = sym_size(sample, 0)          n = sym_size(timestep, 0)
        ones(n) * timestep        ==>    ones(n) * timestep

    Networks broadcast a timestep to the batch through the sample's shape; the block would then depend on the
    sample for an integer only. A graph without shape metadata, or a scalar timestep, is left as it is.
    """
    source = require_input(gm, timestep)
    value = source.meta.get("val")
    modified = False
    if isinstance(value, torch.Tensor) and value.dim() >= 1 and isinstance(value.shape[0], torch.SymInt):
        symbol = value.shape[0].node.expr
        same = [
            n
            for n in gm.graph.find_nodes(op="call_function", target=aten.sym_size.int)
            if n.args != (source, 0)
            and isinstance(n.meta.get("val"), torch.SymInt)
            and n.meta["val"].node.expr == symbol
        ]
        if same:
            last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
            with gm.graph.inserting_after(last):
                size = gm.graph.call_function(aten.sym_size.int, (source, 0))
            size.meta = dict(same[0].meta)
            for node in same:
                node.replace_all_uses_with(size)
                gm.graph.erase_node(node)
            modified = True
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)
