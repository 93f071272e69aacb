"""Choose the integers of one block's weights: GPTQ layer by layer, AdaRound on the block as a whole.

A block runs in two streams: on its inputs in the float network, and on its inputs in the quantized network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.offloaded import loaded
from tfmq_fx.base.progress import track
from tfmq_fx.graph.nodes import attribute, convolution_arguments, groups_of, op_name, weight_argument
from tfmq_fx.observers.static import StaticFakeQuantize
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.results import BlockResult
from tfmq_fx.passes.quantize.two_terms import is_sum_of_terms
from tfmq_fx.recipe import Reconstruction
from tfmq_fx.reconstruction.gptq import Moments, column_pieces, corrected, gptq, joined, parted, supported
from tfmq_fx.reconstruction.streams import Streams


def learns_activations(settings: Reconstruction, method: str) -> bool:
    """Return True if this method learns scales of activations, which must then be quantized."""
    return settings.learn_activation_scale and "adaround" in method


def beside_activations(settings: Reconstruction) -> bool:
    """Return True if blocks' weights are chosen beside quantized activations: to make up for them, or to learn their scales."""
    return settings.corrected is True or learns_activations(settings, settings.method)


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

    Each step of the method is kept only if it lowers the block's error.

    name: of the block, for errors and results.
    iterations: of AdaRound.
    order: returns the index of the next chunk to learn from.
    watch: show a progress bar.

    Raises TFMQError, naming the block, if a loss becomes NaN. The block then has the best integers so far.
    """
    started = time.monotonic()
    weights = weights_of(streams.block)
    scales = [o for _, o in observers(streams.block) if isinstance(o, StaticFakeQuantize)]
    scales = scales if learns_activations(settings, method) else []

    def state() -> list[Tensor]:
        return [o.q for o, _ in weights] + [o.scale.clone() for o in scales]

    best, kept = state(), "nearest"
    error = error_nearest = streams.error()
    hessian_pieces = 1
    if not math.isfinite(error):
        raise TFMQError(
            f"reconstruction of block {name}: the loss is {error} before learning starts; check the calibration data and the "
            "network's values in this block."
        )

    def keep_if_better(name: str) -> None:
        nonlocal best, kept, error
        found = streams.error()
        if found < error:
            best, kept, error = state(), name, found
            return
        streams.kept = False
        for (observer, _), q in zip(weights, best, strict=False):
            observer.q = q
        for fake_quantize, scale in zip(scales, best[len(weights) :], strict=True):
            fake_quantize.scale.copy_(scale)

    if error_nearest > 0.0:  # otherwise there is nothing to gain
        if "gptq" in method:
            targets, hessian_pieces = _second_order(streams, settings, keep="adaround" in method)
            # AdaRound then rounds the corrected weights, instead of the float weights.
            weights = [(o, targets.get(o, w)) for o, w in weights]
            keep_if_better("gptq")
        if "adaround" in method:
            try:
                _learn(name, streams, weights, scales, settings, iterations, order, watch=watch)
            finally:
                keep_if_better("learned")
    return BlockResult(
        name=name,
        weights=sum(o.q.numel() for o, _ in weights),
        error_nearest=error_nearest,
        error=error,
        kept=kept,
        seconds=time.monotonic() - started,
        hessian_pieces=hessian_pieces,
    )


def _learn(
    name: str,
    streams: Streams,
    weights: list[tuple[PerChannelWeightFakeQuantize, Tensor]],
    scales: list[StaticFakeQuantize],
    settings: Reconstruction,
    iterations: int,
    order: Callable[[], int],
    *,
    watch: bool,
) -> None:
    """Run AdaRound (Nagel et al. 2020, eq. 25): min over alpha of the block's error plus a rounding regulariser.

    The error is relative to the block's error before learning, and the regulariser is a mean over weights. So one
    weight of the regulariser suits blocks of any size, scale and bit width. The logarithms of `scales` are learned
    along with the rounding (LSQ, Esser et al. 2020).
    """
    unit = streams.mean_squared_error()
    alphas = [o.start_learning(w) for o, w in weights]
    logs = [o.start_learning() for o in scales]
    optimizer = torch.optim.Adam(
        [
            {"params": alphas, "lr": settings.learning_rate},
            {"params": logs, "lr": settings.activation_learning_rate},
        ][: 2 if logs else 1]
    )
    begin = int(settings.warmup * iterations)
    num_weights = sum(a.numel() for a in alphas)
    try:
        for i in track(range(iterations), f"learning {name}") if watch else range(iterations):
            with torch.enable_grad():
                soft, roundings = zip(*[o.soften() for o, _ in weights], strict=True)
                outputs = [*soft, *[o.soften() for o in scales]]
            leaves = [o.soft for o, _ in weights] + [o.soft for o in scales]
            loss, gradients = streams.gradients(order(), [x for x in leaves if x is not None])
            loss, gradients = loss / unit, [g / unit for g in gradients]
            if i >= begin:
                # b falls linearly. At first, the regulariser lets most roundings move freely; later it pushes
                # them to 0 or 1.
                progress = (i - begin) / max(1, iterations - begin)
                b = settings.beta[1] + (settings.beta[0] - settings.beta[1]) * (1 - progress)
                with torch.enable_grad():
                    open_ = torch.stack([(1 - (2 * r - 1).abs().pow(b)).sum() for r in roundings]).sum()
                outputs.append(open_)
                gradients.append(torch.tensor(settings.round_weight / num_weights, device=open_.device))
                loss = loss + gradients[-1] * open_.detach()
            if not torch.isfinite(loss):
                raise TFMQError(
                    f"reconstruction of block {name}: the loss became {loss.item()} at iteration {i}; check the calibration data, "
                    "or lower Reconstruction.learning_rate."
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, gradients)
            optimizer.step()
    finally:
        for observer, _ in weights:
            observer.stop_learning()
        for fake_quantize in scales:
            fake_quantize.stop_learning()


@torch.no_grad()
def _second_order(
    streams: Streams, settings: Reconstruction, *, keep: bool
) -> tuple[dict[PerChannelWeightFakeQuantize, Tensor], int]:
    """Run GPTQ layer by layer. Each layer sees the outputs of the layers before it, which already have integers.

    Returns the corrected weights that were rounded, by observer, if `keep`, and the most pieces that a layer's
    columns were cut into.
    """
    targets: dict[PerChannelWeightFakeQuantize, Tensor] = {}
    observer_of = {n: o for n, o in observers(streams.block) if isinstance(o, PerChannelWeightFakeQuantize)}
    chunks = streams.chunks[: max(1, settings.gptq_samples // settings.batch_size)]
    parts = [part for chunk in chunks for part in chunk]
    sources: dict[Node, Node] = {}  # layer -> the observer node of its weight
    for layer in streams.block.graph.nodes:
        index = weight_argument(layer)
        source = layer.args[index] if index is not None else None
        # A weight that is read twice gets its integers where it is read first.
        if source in observer_of and supported(layer) and source not in sources.values():
            sources[layer] = source
    asked = {layer: _input_of(layer) for layer in sources}
    corrects = {
        layer
        for layer, source in sources.items()
        if (observer_of[source].bits < 8 if settings.corrected is None else settings.corrected)
    }
    seen = streams.layer_inputs(parts, asked, quantized=True)
    of_corrected = {layer: x for layer, x in asked.items() if layer in corrects}
    given = streams.layer_inputs(parts, of_corrected, quantized=False) if corrects else None
    most = 1
    last: tuple[Node, Any, Moments] | None = None
    for layer, source in sources.items():
        observer, weight, x = observer_of[source], _float_weight(streams.block, source), asked[layer]
        groups, channels = groups_of(layer), weight.shape[0] // groups_of(layer)
        scale, zero_point = (x.reshape(groups, channels, -1) for x in (observer.scale, observer.zero_point))
        columns, blocks = weight[0].numel(), scale.shape[2]
        pieces = column_pieces(groups, columns, blocks, settings.gptq_memory * 2**30)
        most = max(most, pieces)
        inputs = [seen] if given is None or layer not in corrects else [seen, given]
        rows_of = pieces, len(inputs), weight.shape[1:], _geometry(layer)
        if last is None or last[1] != rows_of or not streams.same_inputs(last[0], x, inputs, parts):
            last = None  # free the old moments before the new ones are allocated
            moments = Moments.of(
                layer,
                weight,
                [partial(of, x) for of in inputs],
                parts,
                workers=streams.workers,
                ranks=streams.ranks,
                pieces=pieces,
                positions=-(-settings.gptq_rows * columns // (len(chunks) * settings.batch_size)),
            )
            last = (x, rows_of, moments)
        if blocks == 1:  # all columns share one scale, so every piece takes it
            scale, zero_point = (x.expand(-1, -1, pieces) for x in (scale, zero_point))
        w_GCK = parted(loaded(weight.detach()).reshape(groups, channels, -1), pieces)
        if layer in corrects:
            w_GCK = corrected(w_GCK, last[2], damping=settings.damping)
            if keep:
                targets[observer] = joined(w_GCK, pieces).reshape(weight.shape)
        q = gptq(
            w_GCK,
            last[2],
            parted(scale, pieces),
            parted(zero_point, pieces),
            observer.numbers,
            damping=settings.damping,
        )
        observer.hold(joined(q, pieces).reshape(weight.shape))
    return targets, most


def _geometry(layer: Node) -> dict[str, Any]:
    """Return how a layer makes rows of its input."""
    return {} if op_name(layer) == "linear" else convolution_arguments(layer)


def _input_of(layer: Node) -> Node:
    """Return a layer's input. If that is in two terms, it is their sum: next to what the first of them rounds."""
    x = layer.args[0]
    assert isinstance(x, Node)
    if any(is_sum_of_terms(user) for user in layer.users):
        x = x.args[0]
        assert isinstance(x, Node)
    return x


def weights_of(
    block: GraphModule, *, without: Collection[str] = ()
) -> list[tuple[PerChannelWeightFakeQuantize, Tensor]]:
    """Return the observers of a graph's quantized weights, each with its float weight.

    without: names of observer nodes to skip.
    """
    return [
        (o, _float_weight(block, n))
        for n, o in observers(block)
        if isinstance(o, PerChannelWeightFakeQuantize) and n.name not in without
    ]


def _float_weight(block: GraphModule, node: Node) -> Tensor:
    """Return the float weight that an observer node of the block reads."""
    source = node.args[0]
    assert isinstance(source, Node)
    weight = attribute(block, str(source.target))
    assert isinstance(weight, Tensor)
    return weight
