"""Give the layers of the temporal block one row for each entry of a timestep that has several per sample."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.fakes import fill_fake_values
from tfmq_fx.graph.inputs import conditioning_vectors, timestep_input
from tfmq_fx.graph.nodes import aten, count, fixed_size, meta_value, op_name
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.temporal.find_temporal import taint

# What treats all dimensions but the last alike -> the index of its input.
_BY_ROW = {"linear": 0, "embedding": 1, "layer_norm": 0, "rms_norm": 0}


@declare(after=("bind_parameters", "root_batch_size", "linear_matmuls", "fold_parameters"))
def flatten_entries(gm: GraphModule, *, timestep: str | None = None) -> PassResult:
    """Flatten what the layers of the temporal block read, if the timestep has an entry for each token or frame: (N, tokens).

        linear(h, W, b), h of (N, tokens, C)   ==>   reshape(linear(reshape(h, (-1, C)), W, b), (-1, tokens, D))

    Dim 0 of everything that these layers read and compute is then the entries of the batch in their order, as it is the
    samples where the timestep has shape (N,). Layers that flatten their input themselves stay as they are, and so does a
    graph whose timestep has one entry per sample, and one without shapes. Bitwise unchanged: torch flattens a linear's
    input likewise.

    timestep: the input's name, see `timestep_input`.
    """
    source = timestep_input(gm, timestep)
    t = meta_value(source)
    if not isinstance(t, Tensor) or t.dim() < 2:
        return PassResult(gm, False)
    allowed = {str(source.target), *conditioning_vectors(gm, str(source.target))}
    marks, modified = taint(gm), False
    for node in list(gm.graph.nodes):
        at = _BY_ROW.get(op_name(node)) if node.op == "call_function" else None
        x = node.args[at] if at is not None and at < len(node.args) else None
        if isinstance(x, Node) and str(source.target) in marks[x] and marks[x] <= allowed:
            modified |= _flatten(gm, node, x, t)
    if modified:
        fill_fake_values(gm)
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)


def _flatten(gm: GraphModule, node: Node, x: Node, t: Tensor) -> bool:
    """Let a layer read the rows of x. Return False if these are no entries of the timestep, or dim 0 is all of them already."""
    lead, value = _leading(x, t), meta_value(node)
    if lead is None or lead == 1 or not isinstance(value, Tensor):
        return False
    rest, sizes = [fixed_size(d) for d in meta_value(x).shape[lead:]], [fixed_size(d) for d in value.shape[1:]]
    normed = len(node.args[1]) if op_name(node) in ("layer_norm", "rms_norm") else op_name(node) == "linear"  # type: ignore[arg-type]
    if None in (*rest, *sizes) or len(rest) < normed:
        return False
    call = gm.graph.call_function
    with gm.graph.inserting_before(node):
        rows = call(aten.reshape.default, (x, [-1, *rest]))
        layer = gm.graph.node_copy(node, lambda n: rows if n is x else n)
        layer.meta = {k: v for k, v in node.meta.items() if k not in ("val", "example_value", "tensor_meta")}
        result = call(aten.reshape.default, (layer, [-1, *sizes]))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    return True


def _leading(x: Node, t: Tensor) -> int | None:
    """Return how many of the first dimensions of x have one index for each entry of the timestep; None if none have."""
    value, entries = meta_value(x), count(t.shape)
    if not isinstance(value, Tensor) or not value.dim() or fixed_size(value.shape[0]) is not None:
        return None
    return next((k for k in range(1, value.dim() + 1) if count(value.shape[:k]) == entries), None)
