"""Round to float8 by arithmetic, for engines whose casts to float8 round twice."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base import float8
from tfmq_fx.graph.float8 import is_cast
from tfmq_fx.graph.nodes import aten
from tfmq_fx.passes.pass_manager import declare, rewrite_modules


@declare(after=("convert",))
def round_float8(gm: GraphModule) -> PassResult:
    """Write casts to float8 and back as arithmetic on float32.

        to(to(x, float8), float32)  ==>  round(x / d) * d,   d = 2 ** (floor(log2(max(|x|, 2 ** -6))) - 3)

    x is within the bounds of float8; d is the distance between its two neighbours there.

    Numerics: the same numbers, but at ties: d may be off by a float32 step. Where log2 is off beside a power of two, either
    d gives that power.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    for node in list(module.graph.nodes):
        source = node.args[0] if is_cast(node) and not is_cast(node, float8.DTYPE) else None
        if isinstance(source, Node) and is_cast(source, float8.DTYPE):
            value = _rounded(module, node, source.args[0])
            node.replace_all_uses_with(value)
            module.graph.erase_node(node)
            modified = True
    return modified


def _rounded(module: GraphModule, node: Node, x: object) -> Node:
    with module.graph.inserting_before(node):

        def call(target: object, *args: object) -> Node:
            made = module.graph.call_function(target, args)  # type: ignore[arg-type]
            made.meta = dict(node.meta)
            return made

        size = call(aten.clamp.default, call(aten.abs.default, x), 2.0**float8.LEAST_EXPONENT)
        exponent = call(aten.floor.default, call(aten.log2.default, size))
        spacing = call(aten.pow.Scalar, 2.0, call(aten.sub.Tensor, exponent, float(float8.MANTISSA)))
        return call(aten.mul.Tensor, call(aten.round.default, call(aten.div.Tensor, x, spacing)), spacing)
