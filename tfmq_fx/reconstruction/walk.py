"""Walk a prepared graph once, and reconstruct each block when it is reached."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.utils.fuser_utils import fuse_as_graphmodule

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.mapped import require_free
from tfmq_fx.base.progress import track
from tfmq_fx.calibration.data import CalibrationSet, as_taken, inputs_of
from tfmq_fx.calibration.temporal_rows import is_scalar
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fresh, hinted_shape, meta_value, weight_argument
from tfmq_fx.graph.written import writing_nodes
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.find_blocks import find_blocks
from tfmq_fx.passes.quantize.observed import observer_nodes, observers, without_observers
from tfmq_fx.passes.quantize.results import BlockResult
from tfmq_fx.reconstruction.run import Run
from tfmq_fx.reconstruction.spill import Budget, Values
from tfmq_fx.reconstruction.streams import Outputs, Part, Streams, constant_nodes, value_of


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A block as a separate module."""

    name: str  # the path of its first weight
    module: GraphModule
    inputs: tuple[Node, ...]  # nodes of the graph, in the order of the module's inputs
    outputs: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class _Environments:
    """The values of the nodes in the two streams, for each part of the rows."""

    float: list[Values]
    quantized: list[Values]


def _bytes_held(
    made: Iterable[Sequence[Node]], last_use: Mapping[Node, int], constant: set[Node]
) -> Iterator[int]:
    """Yield the bytes that are held after each step, as far as the capture's shapes tell.

    made: the nodes that each step computes. last_use: the number of the last step that uses a node.
    """
    held: dict[Node, int] = {}
    for i, nodes in enumerate(made):
        for node in nodes:
            x = meta_value(node)
            if isinstance(x, Tensor) and node.op != "placeholder" and node not in constant:
                held[node] = math.prod(hinted_shape(node)) * x.element_size()
        yield sum(held.values())
        for used in [n for n in held if last_use.get(n, -1) <= i]:
            del held[used]


def _bytes_of_block(block: GraphModule) -> int:
    """Return the most bytes that a run of a block with stops at its layers holds."""
    nodes = list(block.graph.nodes)
    last_use = {source: i for i, node in enumerate(nodes) for source in node.all_input_nodes}
    return max(_bytes_held([(n,) for n in nodes], last_use, constant_nodes(block)))


class Walk:
    """A single pass over a prepared graph, in units: single nodes, and blocks that are reconstructed when reached."""

    def __init__(self, gm: GraphModule, data: CalibrationSet, run: Run) -> None:
        self.gm, self.config = fresh(gm), run
        self.data = data
        drawn = data.draw(run.settings.block_samples, seed=run.seed)
        batches = data.groups(run.settings.batch_size, rows=drawn, one_timestep=is_scalar(gm))
        self.chunks, self.rows = run.split(batches, run.parts(gm, data.without_rows))
        for rows in {len(rows): rows for rows in self.rows}.values():
            inputs_of(gm, data.batch(rows))  # raises for inputs that are missing or have another shape
        self.interpreter = Interpreter(self.gm)
        self.passed = observer_nodes(self.gm)

        self.units, member_of = self._units()
        self.order = self._order(self.units, member_of)
        self.last_use: dict[Node, int] = {}
        for i, node in enumerate(self.order):
            for source in self.units[node].inputs if node in self.units else node.all_input_nodes:
                self.last_use[source] = i

    def require_disk(self) -> None:
        """Raise TFMQError if the streams outgrow both max_memory and the free disk, as far as the capture's shapes tell."""
        beyond = self._largest() - self.config.settings.max_memory * 2**30
        require_free(  # float32 is spilled in half precision
            beyond / 2,
            "reconstruction: the streams need",
            "raise Reconstruction.max_memory, lower num_samples",
        )

    def _largest(self) -> int:
        """Return the most bytes that the two streams hold at once, and what GPTQ holds of the block that it works on."""
        inputs = [n for n in placeholders(self.gm).values() if isinstance(meta_value(n), Tensor)]
        batch = next((s[0] for n in inputs if (s := hinted_shape(n))), 1)
        made = [self.units[n].outputs if n in self.units else (n,) for n in self.order]
        streams = _bytes_held(made, self.last_use, constant_nodes(self.gm))
        steps = self.units if "gptq" in self.config.settings.method else {}
        of_blocks = [_bytes_of_block(steps[n].module) if n in steps else 0 for n in self.order]
        most = max(2 * (held + own) for held, own in zip(streams, of_blocks, strict=True))
        return most * sum(map(len, self.rows)) // batch

    def run(self) -> list[BlockResult]:
        """Walk the graph and return the result of each block, in order."""
        held = self.config.settings.max_memory * 2**30 / max(1, 2 * len(self.rows))
        units, order, last_use, constant = self.units, self.order, self.last_use, constant_nodes(self.gm)
        results: list[BlockResult] = []
        with Budget(held) as budget:
            envs = self._environments(budget)
            for i, node in enumerate(track(order, "reconstructing blocks")):
                with self.config.naming(units[node].name if node in units else node.name):
                    if node in units:
                        results += self._reconstruct(units[node], envs, len(results) + 1)
                    elif node in constant:
                        self._share(node, envs)
                    elif node.op not in ("placeholder", "output"):
                        self.config.workers.map(
                            partial(self._step, node=node, envs=envs), range(len(self.rows))
                        )
                for values in (*envs.float, *envs.quantized):
                    for used in [n for n in values if last_use.get(n, -1) <= i]:
                        del values[used]
        return results

    def _units(self) -> tuple[dict[Node, _Unit], dict[Node, Node]]:
        """Return last node -> block for all blocks, and node -> last node of its block for all their nodes."""
        units: dict[Node, _Unit] = {}
        member_of: dict[Node, Node] = {}
        for block in find_blocks(self.gm):
            layer = next(n for n in block.nodes if weight_argument(n) is not None)
            module, inputs, outputs = fuse_as_graphmodule(
                self.gm, list(block.nodes), "block", always_return_tuple=True
            )
            key = block.nodes[-1]
            units[key] = _Unit(name=self._name(layer), module=module, inputs=inputs, outputs=outputs)
            member_of.update(dict.fromkeys(block.nodes, key))
        return units, member_of

    def _environments(self, budget: Budget) -> _Environments:
        """Return streams without values, which read the graph's inputs on access."""
        envs = _Environments(
            float=[Values(budget) for _ in self.rows], quantized=[Values(budget) for _ in self.rows]
        )
        for env in (envs.float, envs.quantized):
            for held, rows in zip(env, self.rows, strict=True):
                for name, node in placeholders(self.gm).items():
                    held.lend(node, partial(self._input, name, rows))
        return envs

    def _value(self, held: Values, node: Node, *, quantized: bool) -> Any:
        """Compute a node from the values of one stream. The float stream skips observers."""
        return value_of(self.interpreter, node, held, () if quantized else self.passed)

    def _step(self, part: int, node: Node, envs: _Environments) -> None:
        """Compute a node for one part of the rows, in both streams."""
        for env in (envs.float, envs.quantized):
            env[part][node] = self._value(env[part], node, quantized=env is envs.quantized)

    def _share(self, node: Node, envs: _Environments) -> None:
        """Compute a node that is the same for all rows once, and share it among all parts."""
        for env in (envs.float, envs.quantized):
            once = self._value(env[0], node, quantized=env is envs.quantized) if env else None
            for held in env:
                held.share(node, once)

    def _input(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of one input. The others are not read: they may be much larger."""
        return as_taken(self.gm, name, self.data.input(name, rows))

    @staticmethod
    def _name(layer: Node) -> str:
        """Return the path of the layer's weight, which names a block better than the fused module's name."""
        index = weight_argument(layer)
        assert index is not None
        weight = layer.args[index]
        while isinstance(weight, Node) and weight.op != "get_attr":
            weight = weight.args[0]
        return str(weight.target) if isinstance(weight, Node) else layer.name

    def _order(self, units: dict[Node, _Unit], member_of: dict[Node, Node]) -> list[Node]:
        """Return the units in a topological order close to the graph's. A block is represented by its last node."""
        position = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        waiting: dict[Node, set[Node]] = {}
        users: dict[Node, list[Node]] = {}
        for node in self.gm.graph.nodes:
            unit = member_of.get(node, node)
            if unit not in waiting:
                sources = units[unit].inputs if unit in units else unit.all_input_nodes
                waiting[unit] = {member_of.get(n, n) for n in sources}
                for source in waiting[unit]:
                    users.setdefault(source, []).append(unit)
        ready = [(position[u], u) for u, sources in waiting.items() if not sources]
        heapq.heapify(ready)
        order: list[Node] = []
        while ready:
            _, unit = heapq.heappop(ready)
            order.append(unit)
            for user in users.get(unit, ()):
                waiting[user].remove(unit)
                if not waiting[user]:
                    heapq.heappush(ready, (position[user], user))
        if len(order) != len(waiting):
            stuck = next(u for u, sources in waiting.items() if sources)
            raise TFMQError(
                f"reconstruction: the blocks around node {stuck.name} depend on each other in a cycle; use method='nearest'."
            )
        return order

    def _reconstruct(self, unit: _Unit, envs: _Environments, index: int) -> list[BlockResult]:
        """Reconstruct one block, if it has quantized weights, and run it in both streams."""

        def run(m: GraphModule, part: Part, quantized: bool) -> Any:
            held = (envs.quantized if quantized else envs.float)[part.index]
            return m(*[held[n] for n in unit.inputs])

        def target(part: Part) -> Outputs:
            return tuple(envs.float[part.index][n] for n in unit.outputs)

        def keep(part: Part, outputs: Outputs, *, quantized: bool = True) -> None:
            held = (envs.quantized if quantized else envs.float)[part.index]
            held.update(zip(unit.outputs, outputs, strict=True))

        def begin(part: Part, quantized: bool) -> Values:
            held = (envs.quantized if quantized else envs.float)[part.index]
            for inner, outer in zip(placeholders(unit.module).values(), unit.inputs, strict=True):
                held.lend(inner, partial(held.__getitem__, outer))
            return held

        streams = Streams(
            unit.module,
            run,
            self.chunks,
            workers=self.config.workers,
            ranks=self.config.ranks,
            target=target,
            keep=keep,
            begin=None if writing_nodes(unit.module) else begin,  # a value that is spilled cannot be written
        )
        in_float = without_observers(unit.module)
        self.config.workers.map(
            lambda part: keep(part, run(in_float, part, False), quantized=False), streams.parts
        )
        results = []
        if any(isinstance(o, PerChannelWeightFakeQuantize) for _, o in observers(unit.module)):
            settings = self.config.settings
            results.append(
                self.config.choose(
                    unit.name, index, streams, method=settings.method, iterations=settings.iterations
                )
            )
        if not streams.kept:
            self.config.workers.map(lambda part: keep(part, streams.outputs(part)), streams.parts)
        return results
