"""Tune all blocks together: the integers of the whole network and their scales, on what the network predicts.

Reconstruction makes each block right on its own; what is left is how their errors add up. Straight-through rounding
(Bengio et al. 2013) with Adam against the float network's outputs, as quantization-aware training has it, but for a few
hundred steps from reconstructed integers, on calibration data. A sampler adds up what the network predicts at every
timestep, and errors there differ a thousandfold, being largest where the least is left to draw: so each timestep's
error counts in units of what it was before, and none is tuned at the cost of the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.progress import track
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.results import BlockResult
from tfmq_fx.passes.quantize.state import temporal_of
from tfmq_fx.recipe import Reconstruction
from tfmq_fx.reconstruction.rounding import weights_of
from tfmq_fx.reconstruction.streams import Outputs, Part, Streams

NAME = "whole network"
RISE = 10  # steps in which the learning rate rises, before it falls to zero
LEAST = 1e-6  # of the largest timestep's error: the least that another is measured in

Weights = Sequence[tuple[PerChannelWeightFakeQuantize, Tensor]]


def float_outputs(outputs: object) -> Outputs:
    return tuple(x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point())


def weights_to_tune(gm: GraphModule) -> Weights:
    """The quantized weights outside the temporal block, whose own reconstruction covers its finite set."""
    return weights_of(gm, without=set(temporal_of(gm).nodes))


@dataclass(frozen=True)
class Memory:
    """Bytes that tuning takes, beside the network and the data."""

    state: int  # variables, their gradients, Adam's moments
    row: int  # what the backward pass keeps of one row of a mini-batch
    output: int  # a row of what the network predicts

    @staticmethod
    def of(
        gm: GraphModule,
        inputs: Sequence[Tensor],
        rows: int,
        weights: Weights,
        settings: Reconstruction,
    ) -> Memory:
        """inputs: of `rows` rows, run once."""
        # A weight's steps, their gradient and two moments, the rounded weight, its gradient and what leads from one to
        # the other; and for each thread a gradient of its own.
        state = (32 + 4 * settings.shards) * sum(o.q.numel() for o, _ in weights)
        if state > settings.max_memory * 2**30:
            return Memory(state, 0, 0)  # not worth a run
        held = {x.untyped_storage().data_ptr() for x in gm.state_dict().values()}
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in held:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        for observer, _ in weights:
            observer.soft = observer.dequantized().requires_grad_()
            held.add(observer.soft.untyped_storage().data_ptr())
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                outputs = gm(*inputs)  # kept until all is counted: memory that is freed is handed out again
            output = sum(x.nbytes for x in float_outputs(outputs))
            del outputs
        finally:
            for observer, _ in weights:
                observer.soft = None
        return Memory(state, math.ceil(sum(kept.values()) / rows), math.ceil(output / rows))

    def needed(self, rows: int, *, targets: int = 0) -> int:
        """For so many rows of a mini-batch at once, with the float network's outputs kept of so many."""
        return self.state + self.row * rows + self.output * targets


class NetworkStreams(Streams):
    """The whole network; its errors are those of rows, each in units of what its timestep has before tuning.

    timesteps: of all rows of all chunks, in their order. units (N,): what they are measured in, once `measure` has run.
    keep_targets: False computes the float network's outputs anew each time.
    """

    def __init__(self, *args: object, timesteps: Tensor, keep_targets: bool, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.timesteps, self.kept_targets = timesteps, math.inf if keep_targets else 0
        self.units = torch.ones(len(timesteps))

    def _of_rows(self, part: Part) -> Tensor:
        """Mean squared error of each row of a part, over all outputs."""
        total, numbers = torch.zeros(part.count), 0
        for y, x in zip(self.outputs(part), self.target(part), strict=True):
            square = (y - x).square()
            # What has no rows belongs to all of them.
            by_row = square.reshape(part.count, -1) if len(x) % part.count == 0 else square.reshape(1, -1)
            total = total.to(x.device) + by_row.sum(1)
            numbers += by_row.shape[1]
        return total / numbers

    def squared_error(self, part: Part) -> Tensor:
        errors = self._of_rows(part)
        units = self.units[part.first : part.first + part.count]
        return (errors / units.to(errors.device)).mean() * part.share

    @torch.no_grad()
    def errors(self) -> Tensor:
        """(N,) of all rows, in float64: the same bits however many processes share them."""
        found = torch.zeros(len(self.timesteps), dtype=torch.float64)
        for part, errors in zip(self.parts, self.workers.map(self._of_rows, self.parts), strict=True):
            found[part.first : part.first + part.count] = errors.double().cpu()
        (found,) = self.ranks.sum([found])
        return found

    def measure(self) -> float:
        """Take the mean error of each timestep, now, as the unit of its rows. The mean over all rows, so measured: about 1."""
        errors = self.errors()
        _, which = self.timesteps.unique(return_inverse=True)
        sums = torch.zeros(int(which.max()) + 1, dtype=torch.float64)
        means = sums.index_add(0, which, errors) / which.bincount()
        least = max(LEAST * means.max().item(), torch.finfo(torch.float32).tiny)
        self.units = means.clamp(min=least)[which].float()
        return self._mean(errors)

    def error(self) -> float:
        return self._mean(self.errors())

    def _mean(self, errors: Tensor) -> float:
        return (errors / self.units.double()).mean().item()


def tune(
    streams: NetworkStreams,
    weights: Weights,
    settings: Reconstruction,
    iterations: int,
    order: Callable[[], int],
) -> BlockResult:
    """Tune the integers and scales of a network's `weights`, in place, if that helps.

    order: the next chunk to learn from. Raises TFMQError when a loss becomes NaN; all is then as it was before.
    """
    started = time.monotonic()
    error = before = streams.measure()
    if not math.isfinite(before):
        raise TFMQError(
            f"tuning: the network's error is {before} before anything is tuned; check the calibration data and the "
            "network's values there."
        )
    kept = "untuned"
    if before > 0.0:  # else there is nothing to win
        saved = [(o, o.q, o.scale) for o, _ in weights]
        try:
            _learn(streams, weights, settings, iterations, order)
            error = streams.error()
        finally:
            if error < before:
                kept = "tuned"
            else:
                error = before
                for observer, q, scale in saved:
                    observer.q, observer.scale = q, scale
    return BlockResult(
        name=NAME,
        weights=sum(o.q.numel() for o, _ in weights),
        error_nearest=before,
        error=error,
        kept=kept,
        seconds=time.monotonic() - started,
    )


def _learn(
    streams: NetworkStreams,
    weights: Weights,
    settings: Reconstruction,
    iterations: int,
    order: Callable[[], int],
) -> None:
    steps, growths = zip(*[o.start_tuning(w) for o, w in weights], strict=True)
    optimizer = torch.optim.Adam(
        [
            {"params": steps, "lr": settings.tune_learning_rate},
            {"params": growths, "lr": settings.tune_scale_learning_rate},
        ]
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / RISE) * (1 - i / iterations)
    )
    try:
        for i in track(range(iterations), "tuning the network"):
            with torch.enable_grad():
                outputs = [o.tuned() for o, _ in weights]
            leaves = [o.soft for o, _ in weights if o.soft is not None]
            loss, gradients = streams.gradients(order(), leaves)
            if not torch.isfinite(loss):
                raise TFMQError(
                    f"tuning: the loss became {loss.item()} at iteration {i}; lower Reconstruction.tune_learning_rate and "
                    "tune_scale_learning_rate, or leave it out (tune_iterations=0)."
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, gradients)
            optimizer.step()
            rate.step()
    finally:
        for observer, _ in weights:
            observer.stop_tuning()
