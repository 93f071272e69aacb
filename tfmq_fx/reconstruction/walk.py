"""Walk a prepared graph once, reconstructing its blocks as they are reached."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.utils.fuser_utils import fuse_as_graphmodule

from tfmq_fx.base._torchao import FakeQuantizeBase
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.progress import track
from tfmq_fx.calibration.data import CalibrationSet, as_taken, inputs_of
from tfmq_fx.calibration.temporal_rows import is_scalar
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fixed_size, fresh, meta_value, weight_argument
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.find_blocks import find_blocks
from tfmq_fx.passes.quantize.observed import observers, without_observers
from tfmq_fx.passes.quantize.results import BlockResult
from tfmq_fx.reconstruction.run import Run
from tfmq_fx.reconstruction.spill import Budget, Values
from tfmq_fx.reconstruction.streams import Outputs, Part, Streams


def _constant(gm: GraphModule) -> set[Node]:
    """What is made of the graph's own tensors alone, such as the quantized weights outside the blocks: the same for all rows."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op != "output" and sources and found.issuperset(sources)):
            found.add(node)
    return found


class Walk:
    """One pass over a prepared graph in units: single nodes, and blocks that are reconstructed when reached."""

    def __init__(self, gm: GraphModule, data: CalibrationSet, run: Run) -> None:
        self.gm, self.config = fresh(gm), run
        self.data = data
        drawn = data.draw(run.settings.num_samples, seed=run.seed)
        batches = data.groups(run.settings.batch_size, rows=drawn, one_timestep=is_scalar(gm))
        parts = 1 if fixed_batch(gm, data.constants.keys()) else run.settings.shards
        self.chunks, self.rows = run.split(batches, parts)
        for rows in {len(rows): rows for rows in self.rows}.values():
            inputs_of(gm, data.batch(rows))  # says what is missing or of another shape
        self.passed = {n for n in self.gm.graph.nodes if n.op == "call_module" and _is_observer(self.gm, n)}

    def run(self) -> list[BlockResult]:
        held = self.config.settings.max_memory * 2**30 / max(1, 2 * len(self.rows))
        with Budget(held) as budget:
            return self._run(budget)

    def _run(self, budget: Budget) -> list[BlockResult]:
        gm = self.gm
        units: dict[Node, tuple[GraphModule, tuple[Node, ...], tuple[Node, ...]]] = {}
        member_of: dict[Node, Node] = {}
        for block in find_blocks(gm):
            layer = next(n for n in block.nodes if weight_argument(n) is not None)
            module, inputs, outputs = fuse_as_graphmodule(
                gm, list(block.nodes), "block", always_return_tuple=True
            )
            module.meta["name"] = self._name(layer)
            key = block.nodes[-1]
            units[key] = (module, inputs, outputs)
            member_of.update(dict.fromkeys(block.nodes, key))
        order = self._order(units, member_of)
        last_use: dict[Node, int] = {}
        for i, node in enumerate(order):
            for source in units[node][1] if node in units else node.all_input_nodes:
                last_use[source] = i
        float_env = [Values(budget) for _ in self.rows]
        quant_env = [Values(budget) for _ in self.rows]
        for env in (float_env, quant_env):
            for held, rows in zip(env, self.rows, strict=True):
                for name, node in placeholders(gm).items():
                    held.lend(node, partial(self._input, name, rows))
        results: list[BlockResult] = []
        interpreter = Interpreter(gm)

        def value(held: Values, node: Node, *, quantized: bool) -> Any:
            if not quantized and node in self.passed:
                return held[node.all_input_nodes[0]]
            own = copy.copy(interpreter)  # an environment for each thread; all else is the graph's
            own.env = held  # type: ignore[assignment]
            return own.run_node(node)

        def step(part: int, node: Node) -> None:
            for env in (float_env, quant_env):
                env[part][node] = value(env[part], node, quantized=env is quant_env)

        constant = _constant(gm)

        for i, node in enumerate(track(order, "reconstructing blocks")):
            if node in units:
                results += self._reconstruct(*units[node], float_env, quant_env, len(results) + 1)
            elif node in constant:
                for env in (float_env, quant_env):
                    once = value(env[0], node, quantized=env is quant_env) if env else None
                    for held in env:
                        held.share(node, once)
            elif node.op not in ("placeholder", "output"):
                self.config.workers.map(partial(step, node=node), range(len(self.rows)))
            for held in (*float_env, *quant_env):
                for used in [n for n in held if last_use.get(n, -1) <= i]:
                    del held[used]
        return results

    def _input(self, name: str, rows: Tensor) -> Tensor:
        """This one alone: the others may be much larger."""
        return as_taken(self.gm, name, self.data.input(name, rows))

    @staticmethod
    def _name(layer: Node) -> str:
        """The path of the block's first weight: fused names are of no use to a person."""
        index = weight_argument(layer)
        assert index is not None
        weight = layer.args[index]
        while isinstance(weight, Node) and weight.op != "get_attr":
            weight = weight.args[0]
        return str(weight.target) if isinstance(weight, Node) else layer.name

    def _order(self, units: dict[Node, Any], member_of: dict[Node, Node]) -> list[Node]:
        """The units in topological order, near the graph's own: a block, under its last node, stands for its nodes."""
        position = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        waiting: dict[Node, set[Node]] = {}
        users: dict[Node, list[Node]] = {}
        for node in self.gm.graph.nodes:
            unit = member_of.get(node, node)
            if unit not in waiting:
                sources = units[unit][1] if unit in units else unit.all_input_nodes
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
                f"reconstruction: the blocks around node {stuck.name} depend on each other; use method='nearest'."
            )
        return order

    def _reconstruct(
        self,
        module: GraphModule,
        inputs: tuple[Node, ...],
        outputs: tuple[Node, ...],
        float_env: list[Values],
        quant_env: list[Values],
        index: int,
    ) -> list[BlockResult]:
        def run(m: GraphModule, part: Part, quantized: bool) -> Any:
            held = (quant_env if quantized else float_env)[part.index]
            return m(*[held[n] for n in inputs])

        def target(part: Part) -> Outputs:
            return tuple(float_env[part.index][n] for n in outputs)

        streams = Streams(
            module, run, self.chunks, workers=self.config.workers, ranks=self.config.ranks, target=target
        )
        in_float = without_observers(module)

        def keep(part: Part, env: list[Values]) -> None:
            values = run(in_float, part, False) if env is float_env else streams.outputs(part)
            env[part.index].update(zip(outputs, values, strict=True))

        self.config.workers.map(partial(keep, env=float_env), streams.parts)
        results = []
        if any(isinstance(o, PerChannelWeightFakeQuantize) for _, o in observers(module)):
            settings = self.config.settings
            name = module.meta["name"]
            results.append(
                self.config.choose(
                    name, index, streams, method=settings.method, iterations=settings.iterations
                )
            )
        self.config.workers.map(partial(keep, env=quant_env), streams.parts)
        return results


def fixed_batch(gm: GraphModule, shared: Collection[str]) -> bool:
    """Whether the graph takes batches of one size only; tensors named `shared` have no rows."""
    values = [meta_value(n) for name, n in placeholders(gm).items() if name not in shared]
    return any(fixed_size(x.shape[0]) is not None for x in values if isinstance(x, Tensor) and x.dim())


def _is_observer(gm: GraphModule, node: Node) -> bool:
    return isinstance(gm.get_submodule(str(node.target)), FakeQuantizeBase)
