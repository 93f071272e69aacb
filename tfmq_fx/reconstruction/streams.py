"""Run a block on its inputs in the float network, and on its inputs in the quantized network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tfmq_fx.base.parallel import Ranks, Workers
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.observed import observer_nodes, without_observers
from tfmq_fx.reconstruction.spill import Values

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Part:
    """A part of the rows of a chunk of calibration data."""

    index: int  # among all parts that this process holds
    share: float  # the fraction of the chunk's rows
    first: int  # the position of its first row among the rows of all chunks
    count: int  # the number of its rows


def constant_nodes(gm: GraphModule) -> set[Node]:
    """Return the nodes that depend only on the graph's own tensors, quantized weights too. Their values are the same for all rows."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op != "output" and sources and found.issuperset(sources)):
            found.add(node)
    return found


def value_of(interpreter: Interpreter, node: Node, held: Values, passed: Container[Node]) -> Any:
    """Compute a node from the values held. One in `passed`, an observer that the float network has not, gives its input."""
    if node in passed:
        return held[node.all_input_nodes[0]]
    own = copy.copy(interpreter)  # each thread needs its own environment
    own.env = held  # type: ignore[assignment]
    return own.run_node(node)


class Steps:
    """A run of a block that goes on as far as is asked for: `on` one part of the data.

    Weights are dequantized right before their layer, so that their integers may change until then.

    asked: layer -> the node whose value is asked for before the layer runs.
    quantized: False passes the observers over, as the float network.
    """

    _held: Values
    _next: int

    def __init__(self, block: GraphModule, asked: Mapping[Node, Node], *, quantized: bool) -> None:
        self._passed: Container[Node] = () if quantized else observer_nodes(block)
        self._interpreter = Interpreter(block)
        self._constant, self._order = constant_nodes(block), _weights_late(block)
        self._last_use: dict[Node, Node] = {}
        for node in self._order:
            for source in (*node.all_input_nodes, *([asked[node]] if node in asked else ())):
                self._last_use[source] = node

    def on(self, held: Values) -> Steps:
        """Return a run at its start.

        held: the values of the block's inputs, by placeholder. The others are added, and removed after their last use.
        """
        found = copy.copy(self)
        found._held, found._next = held, 0
        return found

    def value(self, node: Node) -> Any:
        """Return a node's value. It must not have been freed: ask in the order of the layers."""
        while node not in self._held:
            self._step()
        return self._held[node]

    def outputs(self) -> Outputs:
        """Run the rest of the block, and return its outputs."""
        while self._next < len(self._order) - 1:
            self._step()
        found: Outputs = self._value(self._order[-1])
        return found

    def _value(self, node: Node) -> Any:
        return value_of(self._interpreter, node, self._held, self._passed)

    def _step(self) -> None:
        node, held = self._order[self._next], self._held
        self._next += 1
        if node.op == "placeholder":
            return
        value = self._value(node)
        if node in self._constant:  # what is spilled is rounded
            held.share(node, value)
        else:
            held[node] = value
        for source in node.all_input_nodes:
            if self._last_use[source] is node and source in held:
                del held[source]


def _weights_late(block: GraphModule) -> list[Node]:
    """Return the nodes of a block in order, each weight's observer right before the first node that reads it."""
    late = {n for n, o in observer_nodes(block).items() if isinstance(o, PerChannelWeightFakeQuantize)}
    order: list[Node] = []
    for node in block.graph.nodes:
        if node not in late:
            first = [n for n in node.all_input_nodes if n in late]
            late.difference_update(first)
            order += [*first, node]
    return order


class Streams:
    """A block, and a function that runs any module with the block's inputs on a part of the data.

    chunks: the mini-batches, each as the parts of it that this process holds. The parts of all processes together
        are the whole chunk.
    run(module, part, quantized) -> the module's outputs, on its inputs in the quantized or the float network. Several
        threads call it at once.
    target(part): returns the block's float outputs if they are kept elsewhere; None computes them.
    keep(part, outputs): takes the quantized block's outputs whenever `error` computes them.
    begin(part, quantized): returns the values of the block's inputs in the quantized or the float network, to which those
        of its nodes may be added. None: `run` finds them.

    kept: whether the outputs that `keep` took are those of the block as it is now.
    """

    kept: bool = False

    # Float outputs are kept for at most this many parts. With more (a product of keys) they might not fit in memory, and
    # are computed each time.
    kept_targets: float = 64

    def __init__(
        self,
        block: GraphModule,
        run: Callable[[GraphModule, Part, bool], Outputs],
        chunks: Sequence[Sequence[Part]],
        *,
        workers: Workers,
        ranks: Ranks,
        target: Callable[[Part], Outputs] | None = None,
        keep: Callable[[Part, Outputs], None] | None = None,
        begin: Callable[[Part, bool], Values] | None = None,
    ) -> None:
        self.block, self.run, self.chunks, self._given, self._keep = block, run, chunks, target, keep
        self._begin = begin
        self._steps: dict[Part, Steps] = {}
        self.workers, self.ranks = workers, ranks
        self.parts = [part for chunk in chunks for part in chunk]
        self._float = without_observers(block)
        self._targets: dict[Part, Outputs] = {}

    def outputs(self, part: Part) -> Outputs:
        """Return the quantized block's outputs on its inputs in the quantized network."""
        if (begun := self._steps.pop(part, None)) is not None:
            return begun.outputs()
        return self.run(self.block, part, True)

    def layer_inputs(
        self, parts: Iterable[Part], asked: Mapping[Node, Node], *, quantized: bool
    ) -> Callable[[Node, Part], Tensor]:
        """Return a function of a node of `asked` and a part that gives the node's value in the quantized or the float network.

        asked: layer -> node. Their values are asked for in the order of the layers. Integers of a layer may change until
            the value for a later layer is asked for, and not after that until the `outputs` are: the block is run once, with
            stops on its way, if the streams can `begin`.
        """
        if self._begin is None:
            probes = {node: _probe(self.block, node) for node in asked.values()}
            probes = probes if quantized else {node: without_observers(m) for node, m in probes.items()}
            return lambda node, part: self.run(probes[node], part, quantized)[0]
        steps = Steps(self.block, asked, quantized=quantized)
        begun = {part: steps.on(self._begin(part, quantized)) for part in parts}
        if quantized:
            self._steps = begun
        return lambda node, part: begun[part].value(node)

    def same_inputs(
        self, a: Node, b: Node, inputs: Iterable[Callable[[Node, Part], Tensor]], parts: Sequence[Part]
    ) -> bool:
        """Return True if two nodes have the same values, by functions of `layer_inputs`.

        Streams that can `begin` have many, which are not compared: it is then one node. Those of a temporal block are few, and
        the same before each of its embedding layers, behind a SiLU and an observer of its own.
        """
        if a is b or self._begin is not None:
            return a is b
        return self.ranks.all(all(torch.equal(x(a, part), x(b, part)) for x in inputs for part in parts))

    @torch.no_grad()
    def target(self, part: Part) -> Outputs:
        """Return the float block's outputs on its inputs in the float network."""
        if self._given is not None:
            return self._given(part)
        if part in self._targets:
            return self._targets[part]
        found = self.run(self._float, part, False)
        if len(self.parts) <= self.kept_targets:
            self._targets[part] = found
        return found

    def squared_error(self, part: Part) -> Tensor:
        """Return the squared error of a part, times the part's share.

        It is summed over dim 1 (channels or features), averaged over the other dims, and summed over the outputs.
        """
        pairs = zip(self.outputs(part), self.target(part), strict=True)
        errors = [difference(y, x).square().sum(1).mean() for y, x in pairs if x.is_floating_point()]
        return torch.stack(errors).sum() * part.share

    @torch.no_grad()
    def mean_squared_error(self) -> float:
        """Return the `squared_error` of a whole chunk, averaged over chunks."""
        (total,) = self.ranks.sum(
            [_sum([e.double() for e in self.workers.map(self.squared_error, self.parts)])]
        )
        return total.item() / len(self.chunks)

    def gradients(self, chunk: int, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the `squared_error` of a whole chunk, and its gradients.

        Parts are summed in order, and then processes.
        """

        def of_part(part: Part) -> list[Tensor]:
            with torch.enable_grad():
                loss = self.squared_error(part)
            return [
                loss.detach(),
                *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True),
            ]

        parts, sums = self.chunks[chunk], [torch.zeros(()), *[torch.zeros_like(x) for x in leaves]]
        for i in range(0, len(parts), self.workers.count):  # hold only one set of gradients per thread
            for found in self.workers.map(of_part, parts[i : i + self.workers.count]):
                sums = [total.to(x.device) + x for total, x in zip(sums, found, strict=True)]
        loss, *gradients = self.ranks.sum(sums)
        return loss, gradients

    @torch.no_grad()
    def error(self) -> float:
        """Return the mean squared error over all parts and outputs."""

        def of_part(part: Part) -> Tensor:
            total = torch.zeros(2, dtype=torch.float64)
            outputs = self.outputs(part)
            if self._keep is not None:
                self._keep(part, outputs)
            for y, x in zip(outputs, self.target(part), strict=True):
                if x.is_floating_point():
                    total += torch.stack(
                        [difference(y, x).square().sum().double().cpu(), torch.tensor(float(x.numel()))]
                    )
            return total

        found = self.workers.map(of_part, self.parts)
        self.kept = self._keep is not None
        (sums,) = self.ranks.sum([_sum(found) if found else torch.zeros(2, dtype=torch.float64)])
        return float(sums[0] / sums[1])


def _probe(block: GraphModule, node: Node) -> GraphModule:
    """Return the block up to `node`, its only output."""
    probe = fresh(block)
    found = next(n for n in probe.graph.nodes if n.name == node.name)
    probe.graph.output_node().args = ((found,),)
    probe.graph.eliminate_dead_code()
    probe.recompile()
    return probe


def difference(y: Tensor, x: Tensor) -> Tensor:
    """Return y - x in float32: the error of an output in half precision may be below its last bit."""
    return y.float() - x.float()


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum, added up in order; zero for no tensors."""
    total = torch.zeros((), dtype=torch.float64) if not tensors else tensors[0].clone()
    for x in tensors[1:]:
        total += x
    return total
