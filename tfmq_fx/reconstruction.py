"""Choose the integers of the weights: TIAR on the temporal block, then block after block, then all blocks together.

One walk of the graph keeps two streams, float and quantized. A block's input comes from the quantized
stream (what it will really see), its target from the float stream; the network is never restarted.
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.utils.fuser_utils import fuse_as_graphmodule

from tfmq_fx._torchao import FakeQuantizeBase
from tfmq_fx.calibration import CalibrationSet, as_taken, inputs_of
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import fixed_size, fresh, meta_value, placeholders, weight_argument
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.parallel import Ranks, Workers, workers
from tfmq_fx.passes.annotate import Note
from tfmq_fx.passes.find_blocks import find_blocks
from tfmq_fx.passes.find_temporal import temporal_of
from tfmq_fx.passes.partition_temporal import extract_temporal
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.prepare import observers, require_stage, set_mode, without_observers
from tfmq_fx.progress import track
from tfmq_fx.recipe import Reconstruction
from tfmq_fx.resume import Finished, fingerprint
from tfmq_fx.rounding import BlockResult, Outputs, Part, Streams, choose_rounding
from tfmq_fx.spill import Budget, Values
from tfmq_fx.temporal import is_scalar, require_keys_only, run_temporal, temporal_rows
from tfmq_fx.tuning import Memory, NetworkStreams, float_outputs, tune, weights_to_tune


@declare(needs=("calibrate",))
def reconstruct(
    gm: GraphModule,
    calibration: CalibrationSet,
    settings: Reconstruction | None = None,
    *,
    seed: int = 0,
    state: str | Path | None = None,
) -> GraphModule:
    """Choose the rounding of every quantized weight of a calibrated graph, in place, by `settings.method`.

    First TIAR (TFMQ-DM, Temporal Information Aware Reconstruction): the whole temporal block at once, over all timesteps of the schedule, no data.
    Then the blocks of `find_blocks` in order, AdaRound with quantized input and float target. A block whose
    learned rounding is no better than round-to-nearest on the calibration data keeps round-to-nearest. Then, unless
    settings.tune_iterations is 0, all of them together, integers and scales, on the network's output (`tuning`). With
    maintain="cache" the temporal block is passed over, and the others see its float features, as they will.

    state: a folder that keeps every finished block; the same call after an interruption goes on from there and
        ends with the same integers. It stays; remove it when the result is saved.

    The results are in gm.meta["reconstruction"]; tuning that settings.max_memory does not allow is left out, which a
    note of gm.meta["plan"] says. Raises TFMQError when a loss becomes NaN, naming the block, and for a state folder that
    cannot be written or belongs to another run.
    """
    require_stage(gm, "calibrated")
    settings = settings or gm.meta["recipe"].reconstruction
    iterations = tune_iterations(settings)
    if settings.method == temporal_method(settings) == "nearest" and not iterations:
        return gm
    ranks = Ranks()
    if settings.shards % ranks.size:
        settings = dataclasses.replace(settings, shards=-(-settings.shards // ranks.size) * ranks.size)
    finished = Finished(
        None if state is None else Path(state), fingerprint(gm, calibration.tensors, settings, seed), ranks
    )
    # Only integers and scales are learned. (torch 2.11 also crashes in a group norm backward that is asked for its
    # parameters' gradients alone, channels last.)
    frozen = [p for p in gm.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        results = []
        with workers(settings.shards) as threads, torch.no_grad():
            run = _Run(settings, seed, finished, threads, ranks)
            # A block whose features will be looked up is not worth learning, and the others shall see what they will look up.
            cached = gm.meta["recipe"].maintain == "cache"
            if temporal_method(settings) != "nearest" and _learnable(gm, temporal=True) and not cached:
                results.append(_reconstruct_temporal(gm, calibration, run))
            if _learnable(gm, temporal=False):
                with _temporal_in_float(gm) if cached else nullcontext():
                    blocks = _Walk(gm, calibration, run).run() if settings.method != "nearest" else []
                    results += blocks
                    if iterations:
                        results += _tune(gm, calibration, run, iterations, index=len(blocks) + 1)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    gm.meta.update(stage="reconstructed", reconstruction=tuple(results))
    return gm


@contextmanager
def _temporal_in_float(gm: GraphModule) -> Iterator[None]:
    inside = set(temporal_of(gm).nodes)
    of_block = [o for n, o in observers(gm) if n.name in inside]
    for observer in of_block:
        set_mode(observer, observe=False, quantize=False)
    try:
        yield
    finally:
        for observer in of_block:
            set_mode(observer, observe=False, quantize=True)


def temporal_method(settings: Reconstruction) -> str:
    return settings.temporal_method or ("nearest" if settings.method == "nearest" else "gptq")


def tune_iterations(settings: Reconstruction) -> int:
    if settings.tune_iterations is not None:
        return settings.tune_iterations
    return 0 if settings.method == "nearest" else 400


def _learnable(gm: GraphModule, *, temporal: bool) -> bool:
    inside = set(temporal_of(gm).nodes)
    return any(
        (n.name in inside) == temporal
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
    )


@dataclass(frozen=True)
class _Run:
    """What every block of one call shares."""

    settings: Reconstruction
    seed: int
    finished: Finished
    workers: Workers
    ranks: Ranks

    def split(self, chunks: Iterable[Tensor], parts: int) -> tuple[list[list[Part]], list[Tensor]]:
        """Each chunk of row numbers in so many parts: those that are this process's, and the numbers of their rows."""
        found: list[list[Part]] = []
        rows: list[Tensor] = []
        first = 0
        for chunk in chunks:
            found.append([])
            for piece in self.ranks.share(torch.arange(len(chunk)).tensor_split(parts)):
                if size := len(piece):
                    found[-1].append(Part(len(rows), size / len(chunk), first + int(piece[0]), size))
                    rows.append(chunk[piece])
            first += len(chunk)
        return found, rows

    def choose(
        self, name: str, index: int, streams: Streams, *, method: str, iterations: int, watch: bool = False
    ) -> BlockResult:
        """The integers of one block."""

        def learn() -> BlockResult:
            return choose_rounding(
                name,
                streams,
                method=method,
                settings=self.settings,
                iterations=iterations,
                order=self.order(index, len(streams.chunks)),
                watch=watch,
            )

        return self.once(index, streams.block, learn)

    def once(self, index: int, block: GraphModule, learn: Callable[[], BlockResult]) -> BlockResult:
        """What was kept from an earlier run, or else learned now and kept."""
        result = self.finished.restore(index, block)
        if result is None:
            result = learn()
            self.finished.keep(index, block, result)
        return result

    def order(self, index: int, chunks: int) -> Callable[[], int]:
        """The next chunk to learn from: all of them, shuffled, then all again."""
        # A generator for each block: what one block draws does not depend on the blocks before it.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        pending: list[int] = []

        def following() -> int:
            if not pending:
                pending.extend(torch.randperm(chunks, generator=generator).tolist())
            return pending.pop()

        return following


def _reconstruct_temporal(gm: GraphModule, calibration: CalibrationSet, run: _Run) -> BlockResult:
    """TIAR: L = sum_i || g_i(h(t)) - q(g_i)(q(h)(t)) ||_F^2 over all t of the schedule (TFMQ-DM, TIAR).

    Over all finite keys where other inputs join the timestep, and over sampled rows where they have no table.
    """
    block = extract_temporal(gm, temporal_of(gm))
    require_keys_only(gm, block)
    rows, scalar = temporal_rows(gm, calibration.tensors), is_scalar(gm)
    count, size = len(rows[gm.meta["timestep"]]), run.settings.temporal_batch_size
    shuffled = torch.arange(count)
    if count > size:
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(run.seed))
    chunks, numbers = run.split(shuffled.split(size), run.settings.shards)
    parts = [{n: x[part] for n, x in rows.items()} for part in numbers]
    streams = Streams(
        block,
        lambda m, part, _: run_temporal(m, parts[part.index], scalar=scalar),
        chunks,
        workers=run.workers,
        ranks=run.ranks,
    )
    return run.choose(
        "temporal_block",
        0,
        streams,
        method=temporal_method(run.settings),
        iterations=run.settings.temporal_iterations,
        watch=True,  # the walk over the blocks has a bar of its own
    )


def _tune(
    gm: GraphModule, calibration: CalibrationSet, run: _Run, iterations: int, *, index: int
) -> list[BlockResult]:
    """`tuning.tune` on as many of the calibration rows as it draws; none, and a note in the plan, where it does not fit."""
    settings = run.settings
    drawn = calibration.draw(iterations * settings.batch_size, seed=run.seed)
    batches = calibration.groups(settings.batch_size, rows=drawn, one_timestep=is_scalar(gm))
    whole = _fixed_batch(gm, calibration.constants.keys())
    count = len(batches[0]) if whole else 1
    weights = weights_to_tune(gm)
    first = inputs_of(gm, calibration.batch(batches[0][:count]))
    memory = Memory.of(gm, first, count, weights, settings)
    # Threads compute a part each, at most as many as there are shards.
    at_once = 1 if whole else settings.shards
    limit, least = settings.max_memory * 2**30, memory.needed(count * at_once)
    if least > limit:
        note = Note(
            name="tuning",
            reason=f"left out: it takes {least / 2**30:.1f} GiB, Reconstruction.max_memory is {settings.max_memory:g}",
            coarser=False,
        )
        gm.meta["plan"] = dataclasses.replace(gm.meta["plan"], notes=(*gm.meta["plan"].notes, note))
        return []
    keep_targets = memory.needed(count * at_once, targets=len(drawn)) <= limit
    room = limit - memory.needed(0, targets=len(drawn) if keep_targets else 0)
    pieces = math.ceil(memory.row * settings.batch_size / max(room, 1))
    parts = 1 if whole else settings.shards * max(1, pieces)

    def learn() -> BlockResult:
        chunks, rows = run.split(batches, parts)

        def outputs(module: GraphModule, part: Part, _quantized: bool) -> Outputs:
            return float_outputs(module(*inputs_of(gm, calibration.batch(rows[part.index]))))

        streams = NetworkStreams(
            gm,
            outputs,
            chunks,
            workers=run.workers,
            ranks=run.ranks,
            timesteps=calibration.tensors[gm.meta["timestep"]][torch.cat(batches)],
            keep_targets=keep_targets,
        )
        return tune(streams, weights, settings, iterations, run.order(index, len(chunks)))

    return [run.once(index, gm, learn)]


def _constant(gm: GraphModule) -> set[Node]:
    """What is made of the graph's own tensors alone, such as the quantized weights outside the blocks: the same for all rows."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op != "output" and sources and found.issuperset(sources)):
            found.add(node)
    return found


class _Walk:
    """One pass over a prepared graph in units: single nodes, and blocks that are reconstructed when reached."""

    def __init__(self, gm: GraphModule, data: CalibrationSet, run: _Run) -> None:
        self.gm, self.config = fresh(gm), run
        self.gm.meta = gm.meta
        self.data = data
        drawn = data.draw(run.settings.num_samples, seed=run.seed)
        batches = data.groups(run.settings.batch_size, rows=drawn, one_timestep=is_scalar(gm))
        parts = 1 if _fixed_batch(gm, data.constants.keys()) else run.settings.shards
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


def _fixed_batch(gm: GraphModule, shared: Collection[str]) -> bool:
    """Whether the graph takes batches of one size only; tensors named `shared` have no rows."""
    values = [meta_value(n) for name, n in placeholders(gm).items() if name not in shared]
    return any(fixed_size(x.shape[0]) is not None for x in values if isinstance(x, Tensor) and x.dim())


def _is_observer(gm: GraphModule, node: Node) -> bool:
    return isinstance(gm.get_submodule(str(node.target)), FakeQuantizeBase)
