"""Choose the rounding of the weights: TIAR on the temporal block, then block after block.

One walk of the graph keeps two streams, float and quantized. A block's input comes from the quantized
stream (what it will really see), its target from the float stream; the network is never restarted.
"""

from __future__ import annotations

import heapq
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.utils.fuser_utils import fuse_as_graphmodule

from tfmq_fx.calibration import CalibrationSet, inputs_of
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import fresh, placeholders, weight_argument
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.find_blocks import find_blocks
from tfmq_fx.passes.find_temporal import temporal_of
from tfmq_fx.passes.partition_temporal import extract_temporal
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.prepare import observers, require_stage, set_mode
from tfmq_fx.progress import track
from tfmq_fx.recipe import Reconstruction
from tfmq_fx.resume import Finished, fingerprint
from tfmq_fx.rounding import BlockResult, Outputs, Streams, choose_rounding, in_float
from tfmq_fx.spill import Budget, Values
from tfmq_fx.temporal import is_scalar, require_keys_only, run_temporal, temporal_rows


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
    learned rounding is no better than round-to-nearest on the calibration data keeps round-to-nearest.

    state: a folder that keeps every finished block; the same call after an interruption goes on from there and
        ends with the same integers. It stays; remove it when the result is saved.

    The results are in gm.meta["reconstruction"]. Raises TFMQError when a loss becomes NaN, naming the block, and
    for a state folder that cannot be written or belongs to another run.
    """
    require_stage(gm, "calibrated")
    settings = settings or gm.meta["recipe"].reconstruction
    if settings.method == temporal_method(settings) == "nearest":
        return gm
    data = calibration.spread(settings.num_samples, seed=seed)
    finished = None
    if state is not None:
        finished = Finished(Path(state), fingerprint(gm, calibration.tensors, settings, seed))
    # Only the rounding is learned. (torch 2.11 also crashes in a group norm backward that is asked for its
    # parameters' gradients alone, channels last.)
    frozen = [p for p in gm.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        results = []
        if temporal_method(settings) != "nearest" and _learnable(gm, temporal=True):
            results.append(_reconstruct_temporal(gm, calibration, settings, seed, finished))
        if settings.method != "nearest" and _learnable(gm, temporal=False):
            results += _Walk(gm, data, settings, seed, finished).run()
    finally:
        for p in frozen:
            p.requires_grad_(True)
    gm.meta.update(stage="reconstructed", reconstruction=tuple(results))
    return gm


def temporal_method(settings: Reconstruction) -> str:
    return settings.temporal_method or ("nearest" if settings.method == "nearest" else "gptq")


def _learnable(gm: GraphModule, *, temporal: bool) -> bool:
    inside = set(temporal_of(gm).nodes)
    return any(
        (n.name in inside) == temporal
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
    )


def _reconstruct_temporal(
    gm: GraphModule,
    calibration: CalibrationSet,
    settings: Reconstruction,
    seed: int,
    finished: Finished | None,
) -> BlockResult:
    """TIAR: L = sum_i || g_i(h(t)) - q(g_i)(q(h)(t)) ||_F^2 over all t of the schedule (TFMQ-DM, TIAR).

    Over all finite keys where other inputs join the timestep, and over sampled rows where they have no table.
    """
    block = extract_temporal(gm, temporal_of(gm))
    require_keys_only(gm, block)
    if finished is not None and (kept := finished.restore(0, block)):
        return kept
    rows, scalar = temporal_rows(gm, calibration.tensors), is_scalar(gm)
    generator = torch.Generator().manual_seed(seed)
    count, size = len(rows[gm.meta["timestep"]]), settings.temporal_batch_size
    shuffled = torch.randperm(count, generator=generator) if count > size else torch.arange(count)
    chunks = [{n: x[part] for n, x in rows.items()} for part in shuffled.split(size)]
    pending: list[int] = []

    def order() -> int:
        if not pending:
            pending.extend(
                torch.randperm(len(chunks), generator=generator).tolist() if len(chunks) > 1 else [0]
            )
        return pending.pop()

    result = choose_rounding(
        "temporal_block",
        Streams(block, lambda m, i, _: run_temporal(m, chunks[i], scalar=scalar), len(chunks)),
        method=temporal_method(settings),
        settings=settings,
        iterations=settings.temporal_iterations,
        order=order,
        watch=True,  # the walk over the blocks has a bar of its own
    )
    if finished is not None:
        finished.keep(0, block, result)
    return result


class _Walk:
    """One pass over a prepared graph in units: single nodes, and blocks that are reconstructed when reached."""

    def __init__(
        self,
        gm: GraphModule,
        data: CalibrationSet,
        settings: Reconstruction,
        seed: int,
        finished: Finished | None,
    ) -> None:
        self.gm, self.settings, self.seed, self.finished = fresh(gm), settings, seed, finished
        self.gm.meta = gm.meta
        self.chunks = [
            inputs_of(gm, b) for b in data.batches(settings.batch_size, one_timestep=is_scalar(gm))
        ]
        self.found = [o for _, o in observers(self.gm)]

    def run(self) -> list[BlockResult]:
        with Budget(self.settings.max_memory * 2**30) as budget:
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
        float_env = [Values(budget) for _ in self.chunks]
        quant_env = [Values(budget) for _ in self.chunks]
        for env in (float_env, quant_env):
            for chunk, values in zip(env, self.chunks, strict=True):
                chunk.update(zip(placeholders(gm).values(), values, strict=True))
        results: list[BlockResult] = []
        interpreter = Interpreter(gm)
        for i, node in enumerate(track(order, "reconstructing blocks")):
            if node in units:
                results += self._reconstruct(*units[node], float_env, quant_env, len(results) + 1)
            elif node.op not in ("placeholder", "output"):
                for quantize, env in ((False, float_env), (True, quant_env)):
                    self._mode(quantize)
                    for chunk in env:
                        interpreter.env = chunk  # type: ignore[assignment]
                        with torch.no_grad():
                            chunk[node] = interpreter.run_node(node)
            for env in (float_env, quant_env):
                for chunk in env:
                    for used in [n for n in chunk if last_use.get(n, -1) <= i]:
                        del chunk[used]
        return results

    def _mode(self, quantize: bool) -> None:
        for observer in self.found:
            set_mode(observer, observe=False, quantize=quantize)

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
        def run(m: GraphModule, i: int, quantized: bool) -> Any:
            chunk = (quant_env if quantized else float_env)[i]
            return m(*[chunk[n] for n in inputs])

        def target(i: int) -> Outputs:
            return tuple(float_env[i][n] for n in outputs)

        for i, chunk in enumerate(float_env):
            chunk.update(zip(outputs, in_float(module, partial(run, module, i, False)), strict=True))
        streams = Streams(module, run, len(quant_env), target=target)
        self._mode(True)
        results = []
        if any(isinstance(o, PerChannelWeightFakeQuantize) for _, o in observers(module)):
            kept = self.finished.restore(index, module) if self.finished is not None else None
            results.append(kept or self._choose(module, streams, index))
        with torch.no_grad():
            for i, chunk in enumerate(quant_env):
                chunk.update(zip(outputs, streams.outputs(i), strict=True))
        return results

    def _choose(self, module: GraphModule, streams: Streams, index: int) -> BlockResult:
        # A generator for each block: what one block draws does not depend on the blocks before it.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        shuffled: list[int] = []

        def next_chunk() -> int:
            if not shuffled:
                shuffled.extend(torch.randperm(streams.chunks, generator=generator).tolist())
            return shuffled.pop()

        result = choose_rounding(
            module.meta["name"],
            streams,
            method=self.settings.method,
            settings=self.settings,
            iterations=self.settings.iterations,
            order=next_chunk,
        )
        if self.finished is not None:
            self.finished.keep(index, module, result)
        return result
