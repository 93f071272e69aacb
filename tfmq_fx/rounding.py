"""Choose the integers of one block's weights: GPTQ layer by layer, AdaRound on the block as a whole.

A block runs in two streams: on what the float network would feed it, and on what the quantized one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.errors import TFMQError
from tfmq_fx.gptq import Moments, corrected, gptq, supported
from tfmq_fx.graph import attribute, fresh, weight_argument
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.prepare import observers, set_mode
from tfmq_fx.progress import track
from tfmq_fx.recipe import Reconstruction

KEPT_TARGETS = (
    64  # float outputs of at most this many chunks are kept; those of more are computed again each time
)

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What reconstruction did to one block; errors are mean squared, against the float stream."""

    name: str
    weights: int  # weights whose rounding was learned
    error_nearest: float
    error: float
    kept: str  # "learned" or "gptq"; "nearest" where neither helped
    seconds: float


class Streams:
    """A block, and how any module with its inputs runs on chunk i of the float or of the quantized stream.

    run(module, i, quantized) -> the module's outputs. The block's float outputs are the targets; target(i) gives
    those of chunk i where they are kept elsewhere, None computes them.
    """

    def __init__(
        self,
        block: GraphModule,
        run: Callable[[GraphModule, int, bool], Outputs],
        chunks: int,
        *,
        target: Callable[[int], Outputs] | None = None,
    ) -> None:
        self.block, self.run, self.chunks, self._given = block, run, chunks, target
        self._targets: dict[int, Outputs] = {}

    def outputs(self, i: int) -> Outputs:
        return self.run(self.block, i, True)

    @torch.no_grad()
    def target(self, i: int) -> Outputs:
        """Computed ones are kept, unless there are so many (a product of keys) that they would not fit in memory."""
        if self._given is not None:
            return self._given(i)
        if i in self._targets:
            return self._targets[i]
        found = in_float(self.block, partial(self.run, self.block, i, False))
        if self.chunks <= KEPT_TARGETS:
            self._targets[i] = found
        return found

    def squared_error(self, i: int) -> Tensor:
        """Sum over dim 1 (channels or features), mean over the rest, summed over the outputs."""
        pairs = zip(self.outputs(i), self.target(i), strict=True)
        return torch.stack([(y - x).square().sum(1).mean() for y, x in pairs if x.is_floating_point()]).sum()

    @torch.no_grad()
    def error(self) -> float:
        """Mean squared error over all chunks and outputs."""
        total = count = 0.0
        for i in range(self.chunks):
            for y, x in zip(self.outputs(i), self.target(i), strict=True):
                if x.is_floating_point():
                    total += float((y - x).square().sum())
                    count += x.numel()
        return total / count


@torch.no_grad()
def in_float(block: GraphModule, run: Callable[[], Outputs]) -> Outputs:
    """Run with every observer of `block` passing its input through."""
    found = [o for _, o in observers(block)]
    for observer in found:
        set_mode(observer, observe=False, quantize=False)
    try:
        return run()
    finally:
        for observer in found:
            set_mode(observer, observe=False, quantize=True)


def choose_rounding(
    name: str,
    streams: Streams,
    *,
    method: str,
    settings: Reconstruction,
    iterations: int,
    order: Callable[[], int],
    watch: bool = False,
) -> BlockResult:
    """Set the integers of a block's weights by a method of `recipe.METHODS`.

    What is worse on the block's own error than what stood there before is not kept. order: the next chunk to learn
    from. Raises TFMQError when a loss becomes NaN, naming the block, which then has the best integers so far.
    """
    started = time.monotonic()
    weights = _weights(streams.block)
    best, kept = [o.q for o, _ in weights], "nearest"
    error = error_nearest = streams.error()

    def keep_if_better(name: str) -> None:
        nonlocal best, kept, error
        found = streams.error()
        if found < error:
            best, kept, error = [o.q for o, _ in weights], name, found
        for (observer, _), q in zip(weights, best, strict=True):
            observer.q = q

    if error_nearest > 0.0:  # else there is nothing to win
        if "gptq" in method:
            targets = _second_order(streams, settings)
            # AdaRound then rounds what the quantized inputs ask for, instead of the float weight.
            weights = [(o, targets.get(o, w)) for o, w in weights]
            keep_if_better("gptq")
        if "adaround" in method:
            try:
                _learn(name, streams, weights, settings, iterations, order, watch=watch)
            finally:
                keep_if_better("learned")
    return BlockResult(
        name=name,
        weights=sum(q.numel() for q in best),
        error_nearest=error_nearest,
        error=error,
        kept=kept,
        seconds=time.monotonic() - started,
    )


def _learn(
    name: str,
    streams: Streams,
    weights: list[tuple[PerChannelWeightFakeQuantize, Tensor]],
    settings: Reconstruction,
    iterations: int,
    order: Callable[[], int],
    *,
    watch: bool,
) -> None:
    """AdaRound (Nagel et al. 2020, eq. 25): min over alpha of the block's error plus a rounding regulariser.

    The error is measured in units of what the block has without learning and the regulariser is a mean over
    weights, so that one weight of the regulariser suits blocks of any size, scale and bit width.
    """
    with torch.no_grad():
        unit = sum(streams.squared_error(i) for i in range(streams.chunks)) / streams.chunks
    with torch.enable_grad():
        alphas = [o.start_learning(w) for o, w in weights]
        optimizer = torch.optim.Adam(alphas, lr=settings.learning_rate)
        begin = int(settings.warmup * iterations)
        num_weights = sum(a.numel() for a in alphas)
        for i in track(range(iterations), f"learning {name}") if watch else range(iterations):
            loss = streams.squared_error(order()) / unit
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


@torch.no_grad()
def _second_order(streams: Streams, settings: Reconstruction) -> dict[PerChannelWeightFakeQuantize, Tensor]:
    """GPTQ, layer after layer: each sees its inputs as the layers before it, already in integers, make them.

    The corrected weights that it rounded, by observer.
    """
    targets: dict[PerChannelWeightFakeQuantize, Tensor] = {}
    observer_of = {n: o for n, o in observers(streams.block) if isinstance(o, PerChannelWeightFakeQuantize)}
    chunks = min(streams.chunks, max(1, settings.gptq_samples // settings.batch_size))
    last: tuple[list[Tensor], list[Tensor], Moments] | None = None
    for layer in list(streams.block.graph.nodes):
        index = weight_argument(layer)
        source = layer.args[index] if index is not None else None
        if not isinstance(source, Node) or source not in observer_of or not supported(layer):
            continue
        observer, probe = observer_of[source], _input_of(streams.block, layer)
        weight = _float_weight(streams.block, source)
        given = [in_float(probe, partial(streams.run, probe, i, False))[0] for i in range(chunks)]
        seen = [streams.run(probe, i, True)[0] for i in range(chunks)]
        if last is None or not (_same(given, last[0]) and _same(seen, last[1])):
            # Layers that share their input (every embedding layer of a temporal block) share one Gram matrix.
            moments = Moments.of(layer, weight, given, seen)
            last = (given, seen, moments)
        groups = last[2].h_GKK.shape[0]
        shape = (groups, weight.shape[0] // groups)
        w_GCK = corrected(weight.detach().reshape(*shape, -1), last[2], damping=settings.damping)
        scale, zero_point = observer.scale.reshape(shape), observer.zero_point.reshape(shape)
        q = gptq(w_GCK, last[2], scale, zero_point, observer.integers, damping=settings.damping)
        observer.q = q.reshape(weight.shape).to(observer.dtype)
        targets[observer] = w_GCK.reshape(weight.shape).float()
    return targets


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _input_of(block: GraphModule, layer: Node) -> GraphModule:
    """The block up to `layer`: its inputs -> (what the layer gets,)."""
    probe = fresh(block)
    node = next(n for n in probe.graph.nodes if n.name == layer.name)
    probe.graph.output_node().args = ((node.args[0],),)
    probe.graph.eliminate_dead_code()
    probe.recompile()
    return probe


def _weights(block: GraphModule) -> list[tuple[PerChannelWeightFakeQuantize, Tensor]]:
    return [
        (o, _float_weight(block, n))
        for n, o in observers(block)
        if isinstance(o, PerChannelWeightFakeQuantize)
    ]


def _float_weight(block: GraphModule, node: Node) -> Tensor:
    """The float weight that an observer node of the block reads."""
    source = node.args[0]
    assert isinstance(source, Node)
    weight = attribute(block, str(source.target))
    assert isinstance(weight, Tensor)
    return weight
