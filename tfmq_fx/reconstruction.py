"""Learn the rounding of the weights: TIAR on the temporal block, AdaRound block after block.

One walk of the graph keeps two streams, float and quantized. A block's input comes from the quantized
stream (what it will really see), its target from the float stream; the network is never restarted.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.utils.fuser_utils import fuse_as_graphmodule

from tfmq_fx.calibration import (
    CalibrationSet,
    inputs_of,
    is_scalar,
    require_keys_only,
    run_temporal,
    temporal_rows,
)
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import attribute, fresh, placeholders, weight_argument
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.find_blocks import find_blocks
from tfmq_fx.passes.find_temporal import temporal_of
from tfmq_fx.passes.partition_temporal import extract_temporal
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.prepare import observers, require_stage, set_mode
from tfmq_fx.progress import track
from tfmq_fx.recipe import Reconstruction


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What reconstruction did to one block; errors are mean squared, against the float stream."""

    name: str
    weights: int  # weights whose rounding was learned
    error_nearest: float
    error: float
    kept: str  # "learned", or "nearest" where learning did not help
    seconds: float


@declare(needs=("calibrate",))
def reconstruct(
    gm: GraphModule, calibration: CalibrationSet, settings: Reconstruction | None = None, *, seed: int = 0
) -> GraphModule:
    """Learn the rounding of every quantized weight of a calibrated graph, in place.

    First TIAR (TFMQ-DM, Temporal Information Aware Reconstruction): the whole temporal block at once, over all timesteps of the schedule, no data.
    Then the blocks of `find_blocks` in order, AdaRound with quantized input and float target. A block whose
    learned rounding is no better than round-to-nearest on the calibration data keeps round-to-nearest.

    The results are in gm.meta["reconstruction"]. Raises TFMQError when a loss becomes NaN, naming the block.
    """
    require_stage(gm, "calibrated")
    settings = settings or gm.meta["recipe"].reconstruction
    if settings.method == "nearest":
        return gm
    data = calibration.spread(settings.num_samples, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    # Only the rounding is learned. (torch 2.11 also crashes in a group norm backward that is asked for its
    # parameters' gradients alone, channels last.)
    frozen = [p for p in gm.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        results = []
        if _learnable(gm, temporal=True):
            results.append(_reconstruct_temporal(gm, calibration, settings, generator))
        if _learnable(gm, temporal=False):
            results += _Walk(gm, data, settings, generator).run()
    finally:
        for p in frozen:
            p.requires_grad_(True)
    gm.meta.update(stage="reconstructed", reconstruction=tuple(results))
    return gm


def _learnable(gm: GraphModule, *, temporal: bool) -> bool:
    inside = set(temporal_of(gm).nodes)
    return any(
        (n.name in inside) == temporal
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
    )


def _reconstruct_temporal(
    gm: GraphModule, calibration: CalibrationSet, settings: Reconstruction, generator: torch.Generator
) -> BlockResult:
    """TIAR: L = sum_i || g_i(h(t)) - q(g_i)(q(h)(t)) ||_F^2 over all t of the schedule (TFMQ-DM, TIAR).

    Over all finite keys where other inputs join the timestep, and over sampled rows where they have no table.
    """
    block = extract_temporal(gm, temporal_of(gm))
    require_keys_only(gm, block)
    rows, scalar = temporal_rows(gm, calibration), is_scalar(gm)
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

    def run(chunk: int) -> tuple[Tensor, ...]:
        return run_temporal(block, chunks[chunk], scalar=scalar)

    return _learn(
        "temporal_block",
        block,
        run_chunk=run,
        targets=_FloatTargets(block, run, len(chunks)),
        iterations=settings.temporal_iterations,
        order=order,
        settings=settings,
        watch=True,  # the walk over the blocks has a bar of its own
    )


class _FloatTargets(Sequence[tuple[Tensor, ...]]):
    """The block's float outputs, chunk by chunk: kept when there is one chunk, else computed when asked for, since
    those of a large product of keys (50 timesteps x 1,000 classes) would not fit in memory."""

    def __init__(self, block: GraphModule, run: Callable[[int], tuple[Tensor, ...]], size: int) -> None:
        self.block, self.run, self.size = block, run, size
        self.kept = _in_float(block, lambda: run(0)) if size == 1 else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.size:
            raise IndexError(i)
        return self.kept or _in_float(self.block, lambda: self.run(i))


@torch.no_grad()
def _in_float(block: GraphModule, run: Callable[[], Any]) -> Any:
    """Run with every observer of `block` passing its input through."""
    found = [o for _, o in observers(block)]
    for observer in found:
        set_mode(observer, observe=False, quantize=False)
    try:
        return run()
    finally:
        for observer in found:
            set_mode(observer, observe=False, quantize=True)


def _learn(
    name: str,
    block: GraphModule,
    *,
    run_chunk: Callable[[int], tuple[Tensor, ...]],
    targets: Sequence[tuple[Tensor, ...]],
    iterations: int,
    order: Callable[[], int],
    settings: Reconstruction,
    watch: bool = False,
) -> BlockResult:
    """AdaRound (Nagel et al. 2020, eq. 25): min over alpha of the block's error plus a rounding regulariser.

    The error is measured in units of round-to-nearest's and the regulariser is a mean over weights, so that
    one weight of the regulariser suits blocks of any size, scale and bit width.
    """
    started = time.monotonic()
    weights = [
        (o, _float_weight(block, n))
        for n, o in observers(block)
        if isinstance(o, PerChannelWeightFakeQuantize)
    ]
    nearest = [o.q for o, _ in weights]
    error_nearest = _error(run_chunk, targets)
    if error_nearest == 0.0:  # nothing to win
        return BlockResult(
            name=name,
            weights=sum(q.numel() for q in nearest),
            error_nearest=0.0,
            error=0.0,
            kept="nearest",
            seconds=time.monotonic() - started,
        )
    with torch.no_grad():
        unit = sum(_squared_error(run_chunk(i), t) for i, t in enumerate(targets)) / len(targets)
    with torch.enable_grad():
        alphas = [o.start_learning(w) for o, w in weights]
        optimizer = torch.optim.Adam(alphas, lr=settings.learning_rate)
        begin = int(settings.warmup * iterations)
        num_weights = sum(a.numel() for a in alphas)
        for i in track(range(iterations), f"learning {name}") if watch else range(iterations):
            chunk = order()
            loss = _squared_error(run_chunk(chunk), targets[chunk]) / unit
            if i >= begin:
                # b falls linearly: the regulariser first ignores, then pushes, what is near 0 or 1.
                progress = (i - begin) / max(1, iterations - begin)
                b = settings.beta[1] + (settings.beta[0] - settings.beta[1]) * (1 - progress)
                open_ = sum((1 - (2 * o.rounding - 1).abs().pow(b)).sum() for o, _ in weights)
                loss = loss + settings.round_weight * open_ / num_weights
            if not torch.isfinite(loss):
                for observer, _ in weights:
                    observer.stop_learning()
                raise TFMQError(
                    f"reconstruction of block {name}: the loss became {loss.item()} at iteration {i}; check the calibration data."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for observer, _ in weights:
        observer.stop_learning()
    error = _error(run_chunk, targets)
    kept = "learned"
    if error >= error_nearest:
        kept = "nearest"
        for (observer, _), q in zip(weights, nearest, strict=True):
            observer.q = q
    return BlockResult(
        name=name,
        weights=sum(q.numel() for q in nearest),
        error_nearest=error_nearest,
        error=min(error, error_nearest),
        kept=kept,
        seconds=time.monotonic() - started,
    )


def _float_weight(block: GraphModule, node: Node) -> Tensor:
    """The float weight that an observer node of the block reads."""
    source = node.args[0]
    assert isinstance(source, Node)
    weight = attribute(block, str(source.target))
    assert isinstance(weight, Tensor)
    return weight


def _squared_error(outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
    """Sum over dim 1 (channels or features), mean over the rest, summed over the outputs."""
    terms = [
        (y - x).square().sum(1).mean() for y, x in zip(outputs, targets, strict=True) if x.is_floating_point()
    ]
    return torch.stack(terms).sum()


@torch.no_grad()
def _error(run_chunk: Callable[[int], tuple[Tensor, ...]], targets: Sequence[tuple[Tensor, ...]]) -> float:
    total = count = 0.0
    for i, target in enumerate(targets):
        for y, x in zip(run_chunk(i), target, strict=True):
            if x.is_floating_point():
                total += float((y - x).square().sum())
                count += x.numel()
    return total / count


class _Walk:
    """One pass over a prepared graph in units: single nodes, and blocks that are reconstructed when reached."""

    def __init__(
        self, gm: GraphModule, data: CalibrationSet, settings: Reconstruction, generator: torch.Generator
    ) -> None:
        self.gm, self.settings, self.generator = fresh(gm), settings, generator
        self.gm.meta = gm.meta
        self.chunks = [
            inputs_of(gm, b) for b in data.batches(settings.batch_size, one_timestep=is_scalar(gm))
        ]
        self.found = [o for _, o in observers(self.gm)]

    def run(self) -> list[BlockResult]:
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
        float_env: list[dict[Node, Any]] = [{} for _ in self.chunks]
        quant_env: list[dict[Node, Any]] = [{} for _ in self.chunks]
        for env in (float_env, quant_env):
            for chunk, values in zip(env, self.chunks, strict=True):
                chunk.update(zip(placeholders(gm).values(), values, strict=True))
        results = []
        interpreter = Interpreter(gm)
        for i, node in enumerate(track(order, "reconstructing blocks")):
            if node in units:
                results += self._reconstruct(*units[node], float_env, quant_env)
            elif node.op not in ("placeholder", "output"):
                for quantize, env in ((False, float_env), (True, quant_env)):
                    self._mode(quantize)
                    for chunk in env:
                        interpreter.env = chunk
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
        float_env: list[dict[Node, Any]],
        quant_env: list[dict[Node, Any]],
    ) -> list[BlockResult]:
        def run(chunk: dict[Node, Any]) -> Any:
            return module(*[chunk[n] for n in inputs])

        targets = [_in_float(module, lambda c=chunk: run(c)) for chunk in float_env]  # type: ignore[misc]
        self._mode(True)
        results = []
        if any(isinstance(o, PerChannelWeightFakeQuantize) for _, o in observers(module)):
            shuffled: list[int] = []

            def next_chunk() -> int:
                if not shuffled:
                    shuffled.extend(torch.randperm(len(quant_env), generator=self.generator).tolist())
                return shuffled.pop()

            results.append(
                _learn(
                    module.meta["name"],
                    module,
                    run_chunk=lambda i: run(quant_env[i]),
                    targets=targets,
                    iterations=self.settings.iterations,
                    order=next_chunk,
                    settings=self.settings,
                )
            )
        with torch.no_grad():
            for chunk, float_chunk, target in zip(quant_env, float_env, targets, strict=True):
                chunk.update(zip(outputs, run(chunk), strict=True))
                float_chunk.update(zip(outputs, target, strict=True))
        return results
