"""Cut the data path into reconstruction blocks, by dataflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from tfmq_fx.graph.nodes import op_name, value_inputs, weight_argument
from tfmq_fx.passes.low_bits.low_rank import is_branch_sum
from tfmq_fx.passes.quantize.state import temporal_of
from tfmq_fx.passes.quantize.two_terms import is_sum_of_terms
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, constants_of, taint

_JOINS = ("add", "sub")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A group of nodes that are reconstructed together. Invariant: convex, so that they can run as one step."""

    nodes: tuple[Node, ...]  # topologically ordered, with the parameters and observers that only they use


def find_blocks(gm: GraphModule, *, temporal: TemporalBlock | None = None) -> list[Block]:
    """Find residual blocks, and single layers for what is left, in an order in which they can run. Read-only.

        x -> norm -> conv -> conv -> add(x, .)      one block: what lies between x and the add that rejoins it
        x -> conv -> ..                             a layer outside any residual branch: a block of its own

    Only innermost residual blocks count: those that have a weighted layer and contain no smaller residual block
    that has one. Every weighted layer outside the temporal block belongs to exactly one block.
    """
    temporal = temporal or temporal_of(gm)
    inside = set(temporal.nodes)
    marks = taint(gm)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    data = {n for n, m in marks.items() if m - set(temporal.keys) and n.op not in ("placeholder", "output")}
    regions = [r for r in _residual_regions(gm, data) if any(weight_argument(n) is not None for n in r)]
    regions.sort(key=len)
    chosen: list[set[Node]] = []
    taken: set[Node] = set()
    for region in regions:
        if not region & taken:
            chosen.append(region)
            taken |= region
    for node in gm.graph.nodes:
        if weight_argument(node) is not None and node.name not in inside and node not in taken:
            chosen.append({node})
            taken.add(node)
    constant = constants_of(gm, marks, temporal.keys)
    blocks = []
    for members in chosen:
        private = _private_constants(members, constant)
        blocks.append(Block(nodes=tuple(sorted(members | private, key=order.__getitem__))))
    return blocks


def _residual_regions(gm: GraphModule, data: set[Node]) -> Iterable[set[Node]]:
    """Yield, for each add whose operands both come from one data node d, the nodes between d and the add."""
    depth: dict[Node, int] = {}
    dominator: dict[Node, Node | None] = {}

    def common(a: Node | None, b: Node | None) -> Node | None:
        while a is not b:
            if a is None or b is None:
                return None
            if depth[a] >= depth[b]:
                a = dominator[a]
            else:
                b = dominator[b]
        return a

    for node in gm.graph.nodes:
        if node not in data:
            continue
        sources = [n for n in value_inputs(node) if n in data]
        from_input = any(n.op == "placeholder" for n in value_inputs(node)) or not sources
        nearest: Node | None = None if from_input else sources[0]
        for source in sources[1:]:
            nearest = common(nearest, source)
        dominator[node] = nearest
        depth[node] = depth[nearest] + 1 if nearest is not None else 0
        if (
            op_name(node) in _JOINS
            and not is_branch_sum(node)
            and not is_sum_of_terms(node)
            and len(set(sources)) == 2
            and nearest is not None
        ):
            yield _between(nearest, node, data)


def _between(start: Node, end: Node, data: set[Node]) -> set[Node]:
    """Return the data nodes on a path from `start` (excluded, it dominates `end`) to `end` (included)."""
    found = {end}
    stack = [end]
    while stack:
        for source in value_inputs(stack.pop()):
            if source in data and source is not start and source not in found:
                found.add(source)
                stack.append(source)
    return found


def _private_constants(members: set[Node], constant: set[Node]) -> set[Node]:
    """Return the parameters, and their observers, that only `members` use."""
    found: set[Node] = set()
    stack = [n for m in members for n in m.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in constant and node not in found and all(u in members or u in found for u in node.users):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
