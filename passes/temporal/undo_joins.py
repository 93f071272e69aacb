"""Replace the pieces of a join by the tensors that were joined."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.nodes import aten, fixed_size, meta_value
from tfmq_fx.passes.temporal.find_temporal import overwritten

_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
_Span = tuple[int, int]  # from where to where a tensor lies in a join


def undo_joins(gm: GraphModule) -> PassResult:
    """Replace pieces of a join that are the very tensors that were joined. The same values.

        u, v = chunk(cat([a, b], 1), 2, 1)   ==>   u, v = a, b

    A network may pass several embeddings on as one tensor; what it computes of one of them then seems to depend on all.
    Pieces that are parts of a tensor, or of several, stay, and so do those that are written to, and a graph without shape
    metadata.
    """
    found = {n: part for n in gm.graph.nodes if (part := _whole_part(n)) is not None}
    written = overwritten(gm, set(gm.graph.nodes)) if found else set()
    found = {n: part for n, part in found.items() if not {n, part} & written}
    for piece, part in found.items():
        found[piece] = found.get(part, part)  # which may have been such a piece itself
        piece.replace_all_uses_with(found[piece])
        gm.graph.erase_node(piece)
    if found:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(found))


def _whole_part(piece: Node) -> Node | None:
    """Return the tensor that was joined and is taken out again; None if this is no such piece."""
    pieces, index = piece.args if piece.target is operator.getitem else (None, 0)
    join = pieces.args[0] if isinstance(pieces, Node) and pieces.target in _SPLITS else None
    if not isinstance(join, Node) or join.target is not aten.cat.default:
        return None
    assert isinstance(pieces, Node)
    assert isinstance(index, int)
    dim = _dim(join)
    if dim is None or _dim(pieces) != dim or (span := _span(pieces, index, dim)) is None:
        return None
    part = dict(_parts(join, dim, 0)).get(span)
    return part if part is not None and meta_value(part).dtype == meta_value(piece).dtype else None


def _dim(node: Node) -> int | None:
    """Return the dimension, counted from the first, that a join or split works on; None without shape metadata."""
    source, at = (node, 1) if node.target is aten.cat.default else (node.args[0], 2)
    assert isinstance(source, Node)
    value = meta_value(source)
    dim = node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)
    return dim % value.dim() if isinstance(value, Tensor) and isinstance(dim, int) else None


def _span(pieces: Node, index: int, dim: int) -> _Span | None:
    sizes = [fixed_size(x.shape[dim]) for x in meta_value(pieces)[: index + 1]]
    known = [n for n in sizes if n is not None]
    return (sum(known[:-1]), sum(known)) if len(known) == len(sizes) else None


def _parts(join: Node, dim: int, start: int) -> Iterator[tuple[_Span, Node]]:
    """Yield each tensor of a join, and of joins in it, with its span, up to the first whose size may vary."""
    parts = join.args[0]
    assert isinstance(parts, (list, tuple))
    for part in parts:
        assert isinstance(part, Node)
        value = meta_value(part)
        size = fixed_size(value.shape[dim]) if value.dim() > dim else None
        if size is None:
            return
        yield (start, start + size), part
        if part.target is aten.cat.default and _dim(part) == dim:
            yield from _parts(part, dim, start)
        start += size
