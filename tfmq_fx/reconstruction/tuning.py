"""Tune all blocks together: the integers of the whole network and their scales, on the network's outputs.

Reconstruction optimises each block separately. Tuning reduces the error that remains when the blocks' errors add up. It
uses the straight-through estimator for rounding (Bengio et al. 2013) and Adam, against the float network's outputs, like
quantization-aware training, but only for a few hundred steps from reconstructed integers, on calibration data.

A sampler adds up the network's predictions at all timesteps. Their errors differ a thousandfold, and are largest
where the least is left to draw. So each timestep's error is measured relative to its error before tuning, and no
timestep is tuned at the cost of the others.
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
from tfmq_fx.reconstruction.streams import Outputs, Part, Streams, difference

NAME = "whole network"
RISE = 10  # warm-up steps of the learning rate, which then falls to zero
LEAST = 1e-6  # the smallest unit of a timestep, as a share of the largest timestep's error

Weights = Sequence[tuple[PerChannelWeightFakeQuantize, Tensor]]


def float_outputs(outputs: object) -> Outputs:
    """Return the floating-point tensors among a network's outputs, nested or not."""
    return tuple(x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point())


def weights_to_tune(gm: GraphModule) -> Weights:
    """Return the quantized weights outside the temporal block, whose reconstruction already covers its finite set."""
    return weights_of(gm, without=set(temporal_of(gm).nodes))


@dataclass(frozen=True)
class Memory:
    """The bytes that tuning needs, in addition to the network and the data."""

    state: int  # variables, their gradients, Adam's moments
    row: int  # saved for the backward pass, per row of a mini-batch
    output: int  # the network's outputs, per row

    @staticmethod
    def of(
        gm: GraphModule,
        inputs: Sequence[Tensor],
        rows: int,
        weights: Weights,
        settings: Reconstruction,
    ) -> Memory:
        """Measure the bytes by running the network once.

        inputs: the graph's inputs, with `rows` rows.
        weights: those that are tuned.
        """
        # For each weight: its steps, their gradient and two moments, the rounded weight, its gradient, and the
        # intermediate values between them. In addition, one gradient per thread.
        state = (32 + 4 * settings.shards) * sum(o.q.numel() for o, _ in weights)
        if state > settings.max_memory * 2**30:
            return Memory(state, 0, 0)  # not worth a run
        held = {x.untyped_storage().data_ptr() for x in gm.state_dict().values()}
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in held:
                kept[storage.data_ptr()] = storage.nbytes()
            return x.detach()  # itself would be a cycle, if it is an output of what saves it

        for observer, _ in weights:
            observer.soft = observer.dequantized().requires_grad_()
            held.add(observer.soft.untyped_storage().data_ptr())
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                outputs = gm(
                    *inputs
                )  # held until counting ends: freed memory would be reused and counted once
            output = sum(x.nbytes for x in float_outputs(outputs))
            del outputs
        finally:
            for observer, _ in weights:
                observer.soft = None
        return Memory(state, math.ceil(sum(kept.values()) / rows), math.ceil(output / rows))

    def needed(self, rows: int, *, targets: int = 0) -> int:
        """Return the bytes needed for a mini-batch.

        rows: how many of its rows are computed at once.
        targets: for how many rows the float network's outputs are kept.
        """
        return self.state + self.row * rows + self.output * targets


class NetworkStreams(Streams):
    """The streams of the whole network. The error of each row is relative to its timestep's error before tuning.

    timesteps (N,): of all rows of all chunks, in order.
    keep_targets: True keeps the float network's outputs; False computes them each time.

    `units` (N,) are the errors before tuning, once `measure` has run, and 1 before.
    """

    def __init__(self, *args: object, timesteps: Tensor, keep_targets: bool, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.timesteps, self.kept_targets = timesteps, math.inf if keep_targets else 0
        self.units = torch.ones(len(timesteps))

    def _of_rows(self, part: Part) -> Tensor:
        """Return the mean squared error of each row of a part, over all outputs."""
        total, numbers = torch.zeros(part.count), 0
        for y, x in zip(self.outputs(part), self.target(part), strict=True):
            square = difference(y, x).square()
            # The error of an output without rows counts for every row.
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
        """Return the errors of all rows (N,), in float64, bitwise the same for any number of processes."""
        found = torch.zeros(len(self.timesteps), dtype=torch.float64)
        for part, errors in zip(self.parts, self.workers.map(self._of_rows, self.parts), strict=True):
            found[part.first : part.first + part.count] = errors.double().cpu()
        (found,) = self.ranks.sum([found])
        return found

    def measure(self) -> float:
        """Set the unit of each row to the current mean error of its timestep.

        Returns the mean error over all rows in these units, which is about 1.
        """
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
    """Tune the integers and scales of a network's `weights`, in place. Keep the result only if the error falls.

    order: returns the index of the next chunk to learn from.

    Raises TFMQError if a loss becomes NaN, and then restores the integers and scales.
    """
    started = time.monotonic()
    error = before = streams.measure()
    if not math.isfinite(before):
        raise TFMQError(
            f"tuning: the network's error is {before} before tuning starts; check the calibration data and the network's "
            "outputs on it."
        )
    kept = "untuned"
    if before > 0.0:  # otherwise there is nothing to gain
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
                    "tune_scale_learning_rate, or turn tuning off (tune_iterations=0)."
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, gradients)
            optimizer.step()
            rate.step()
    finally:
        for observer, _ in weights:
            observer.stop_tuning()
