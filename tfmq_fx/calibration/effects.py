"""Estimate what rounding one tensor inside a network does to the network's output, for all tensors at once.

A small error d of an inner tensor changes the output by J d, J the Jacobian there. If d comes from rounding, its elements
have the variance step^2 / 12 and are uncorrelated (Widrow & Kollar 2008), so E |J d|^2 = step^2 / 12 * sum of J's squared
elements. These are E (v^T J)^2, with v of independent standard normal numbers (Hutchinson 1989): what one backward pass
of v^T output brings back to every tensor. Where values are small against the step, errors are correlated: the mean of
(v^T J d)^2 over rows, d the true error, says by how much the variance alone falls short. Errors of different tensors are
assumed to add up, and the network to be linear in them.

Smoothing levels the channels by their largest values in the calibration data. A row that is not in it has larger ones in
some channels, which are clipped. By how much is estimated by leaving out, channel by channel, the trajectory with the
largest value: rows of one trajectory are much alike.

Legend: P rows of calibration data, C input channels, T timesteps among the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from tfmq_fx.base.arithmetic import (
    FLOAT_BITS,
    IntegerRange,
    NumberRange,
    activation_numbers,
    choose_qparams,
    fake_quantize,
    weight_numbers,
)
from tfmq_fx.base.entries import per_sample
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.offloaded import loaded
from tfmq_fx.base.parallel import workers
from tfmq_fx.calibration.calls import overflow_words
from tfmq_fx.calibration.data import CalibrationSet, inputs_of
from tfmq_fx.calibration.temporal_rows import is_scalar
from tfmq_fx.graph.channels import ParameterLayer, channel_axis
from tfmq_fx.graph.inputs import rows_at_once
from tfmq_fx.graph.nodes import attribute, dtype_of, output_channel_axis, weight_argument
from tfmq_fx.graph.written import keeps_buffers
from tfmq_fx.passes.quantize.plan import LayerPlan

ROWS = 16
POWER, VARIANCE = "power", "variance"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer to be quantized, with candidates for the smoothing of its input."""

    plan: LayerPlan
    node: Node
    layer: ParameterLayer | None  # as the low-bit passes see it; None if they leave it
    group: int  # layers with the same number share their smoothing
    # Candidate -> s (C,), by which the weight's input channels are multiplied; None: 1. All readers of a group
    # have the same candidates.
    smoothing: Mapping[Any, Tensor | None]
    # Candidate -> (C,): the mean squared error of an element from what other rows clip; none: 0.
    clipping: Mapping[Any, Tensor]
    weight_bits: tuple[int, ...]  # the candidates

    @property
    def source(self) -> Node:
        x = self.node.args[0]
        assert isinstance(x, Node)
        return x

    @property
    def weight(self) -> Node:
        w = self.node.args[weight_argument(self.node)]  # type: ignore[index]
        assert isinstance(w, Node)
        return w

    @property
    def weight_value(self) -> Tensor:
        value: Tensor = attribute(self.node.graph.owning_module, self.plan.path)  # type: ignore[arg-type]
        return value

    @property
    def input(self) -> tuple[str, int]:
        """Return what names the quantized input: readers of one node in one group share it."""
        return self.source.name, self.group

    @property
    def axis(self) -> int:
        """Return the channel dimension of its input, counted from the end."""
        return channel_axis(self.node, self.weight_value)

    @property
    def plain(self) -> bool:
        """Return True if all integers of an output channel, which is dim 0 of the weight, share one scale."""
        integers = isinstance(weight_numbers(8, self.plan.dtype), IntegerRange)
        return integers and self.plan.group_size is None and output_channel_axis(self.node) == 0

    def by_input(self, s_C: Tensor) -> Tensor:
        """Return s in the shape of the weight, which it multiplies."""
        assert self.layer is not None
        return self.layer.from_input(s_C[:, None].expand_as(self.layer.by_input()))


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Expected squared errors of the output, summed over its elements, by row (P,)."""

    timesteps: Tensor  # (P,)
    # Reader's `input` -> (P, C): of an error of variance 1 in every element of a channel of the input.
    inputs: dict[tuple[str, int], Tensor]
    # Reader's `input` -> smoothing -> how many times as large the true error's effect is as that of its variance.
    correlated: dict[tuple[str, int], dict[Any, float]]
    weights: dict[
        str, dict[tuple[Any, int], Tensor]
    ]  # path -> (smoothing, bits) -> (P,), of rounding to nearest
    power: Tensor  # (P,) of the output itself


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The values of every channel of a layer's input in some rows of calibration data.

    Index T of dim 0 has the rows of all other timesteps, +-inf if there are none.
    """

    low_TC: Tensor
    high_TC: Tensor
    # Largest |x_j| in each row of the trajectory that has the largest of all, falling; filled up with 0.
    outer_RC: Tensor
    second_C: Tensor  # largest |x_j| in the rows of the other trajectories
    rows: int
    positions: int  # the most values of a channel in one row

    @property
    def largest_C(self) -> Tensor:
        return self.outer_RC[0]

    def clipped(self, s_C: Tensor, without_C: Tensor) -> Tensor:
        """Return the mean squared error (C,) of an element that another row's clipping makes.

        s: the smoothing, by which x is divided. without: the same, had each channel's outer trajectory not been seen; then its
            values would be clipped to where the other channels end.
        """
        outer_RC = self.outer_RC.double()
        limit = (outer_RC[0] / s_C.to(outer_RC)).amax()
        beyond_RC = (outer_RC - limit * without_C.to(outer_RC)).clamp_min(0.0)
        return beyond_RC.square().sum(0) / (self.rows * self.positions)


@keeps_buffers
@torch.no_grad()
def input_ranges(
    gm: GraphModule,
    calibration: CalibrationSet,
    axes: Mapping[str, int],
    timesteps: Tensor,
    *,
    num_samples: int = 1024,
    batch_size: int = 64,
    only_size: int | None = None,
    seed: int = 0,
) -> dict[str, Ranges]:
    """Return node name -> the ranges of every channel of a layer's input.

    Where dim 0 is not the batch, all rows count for every timestep.

    gm: a float graph. axes: layer's node name -> the channel dimension of its input, from the end. timesteps (T,).
    num_samples: rows of the calibration data, spread evenly over the timesteps, that the graph runs on once.
    only_size: the only batch size that the graph takes; None if it takes any.

    Raises TFMQError, naming the layer, if its input overflows.
    """

    class Watch(Interpreter):
        found: dict[str, tuple[Tensor, Tensor, int]]

        def run_node(self, n: Node) -> Any:
            if n.name in axes:
                x_NCK = by_channel(self.env[n.args[0]], axes[n.name])  # type: ignore[index]
                if not x_NCK.numel():  # no tokens of a kind, for instance; `calibrate` refuses to quantize it
                    x_NCK = x_NCK.new_zeros(len(x_NCK), x_NCK.shape[1], 1)
                self.found[n.name] = (x_NCK.amin(2).float(), x_NCK.amax(2).float(), x_NCK.shape[2])
            return super().run_node(n)

    def observe(rows: Tensor) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor, int]]]:
        watch, batch = Watch(gm), calibration.batch(rows)
        watch.found = {}
        watch.run(*inputs_of(gm, batch))
        t = per_sample(batch[calibration.timestep])
        same = t[:, None] == timesteps.to(t)
        number_N = (same * torch.arange(len(timesteps), device=same.device)).sum(1)  # at most one is the same
        return trajectories[rows], torch.where(same.any(1), number_N, len(timesteps)), watch.found

    drawn, trajectories = calibration.draw(num_samples, seed=seed), calibration.trajectories()
    size = only_size or rows_at_once(gm, batch_size, calibration.without_rows)
    batches = calibration.groups(size, rows=drawn, one_timestep=is_scalar(gm))
    whole = [rows for rows in batches if only_size in (None, len(rows))]
    with workers(8) as threads:
        found = threads.map(observe, whole)
    ranges = {
        name: _merged([(of, index, *watched[name]) for of, index, watched in found], len(timesteps))
        for name in axes
    }
    nodes = {n.name: n for n in gm.graph.nodes}
    for name, x in largest(ranges).items():
        if not x.isfinite().all():
            raise TFMQError(overflow_words(f"the input of {name}", dtype_of(nodes[name]), "a batch"))
    return ranges


def largest(ranges: Mapping[str, Ranges]) -> dict[str, Tensor]:
    """Return node name -> max |X_j| of each input channel j (C,)."""
    return {name: found.largest_C for name, found in ranges.items()}


def by_channel(x: Tensor, axis: int) -> Tensor:
    """Return x as (N, C, K), its channels at dim `axis`, counted from the end; N is 1 for a single sample."""
    x = x if x.dim() > -axis else x[None]
    return x.movedim(axis, 1).reshape(len(x), x.shape[axis], -1)


def _merged(batches: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, int]], count: int) -> Ranges:
    """Return the ranges of batches of (trajectory (N,), index (N,), minimum (N, C), maximum (N, C), positions), T = `count`."""
    low_TC = batches[0][2].new_full((count + 1, batches[0][2].shape[1]), torch.inf)
    high_TC = -low_TC
    for _, index_N, low_NC, high_NC, _ in batches:
        if len(low_NC) == len(index_N):
            where = index_N.to(low_NC.device)[:, None].expand_as(low_NC)
            low_TC.scatter_reduce_(0, where, low_NC, "amin")
            high_TC.scatter_reduce_(0, where, high_NC, "amax")
        else:
            low_TC = torch.minimum(low_TC, low_NC.amin(0))
            high_TC = torch.maximum(high_TC, high_NC.amax(0))
    x_NC = torch.cat([torch.maximum(-low, high) for _, _, low, high, _ in batches])
    of_N = torch.cat([of for of, *_ in batches]).to(x_NC.device)
    if len(of_N) != len(x_NC):  # dim 0 is not the batch
        of_N = torch.arange(len(x_NC), device=x_NC.device)
    _, of_N, sizes = of_N.unique(return_inverse=True, return_counts=True)
    by_trajectory = x_NC.new_zeros(len(sizes), x_NC.shape[1])
    by_trajectory.scatter_reduce_(0, of_N[:, None].expand_as(x_NC), x_NC, "amax")
    # Of a single trajectory, nothing is known about others.
    outermost = by_trajectory.topk(min(2, len(sizes)), 0)
    outer_NC = x_NC.where(of_N[:, None] == outermost.indices[0], 0.0)
    return Ranges(
        low_TC=low_TC,
        high_TC=high_TC,
        outer_RC=outer_NC.topk(int(sizes.max()), 0).values,
        second_C=outermost.values[-1],
        rows=len(x_NC),
        positions=max(positions for *_, positions in batches),
    )


@keeps_buffers
@torch.no_grad()
def output_effects(
    gm: GraphModule,
    calibration: CalibrationSet,
    readers: Sequence[Reader],
    qparams: Mapping[tuple[str, int], Mapping[Any, tuple[Tensor, Tensor]]],
    rows: Sequence[Tensor],
    *,
    shards: int = 2,
    seed: int = 0,
) -> Effects:
    """Return what errors in every reader's input and weight do to the output of a float graph.

    qparams: reader's `input` -> smoothing -> (scale (P,), zero_point (P,)) of the smoothed input in each run.
    rows: the indices of each run's rows, of one timestep. A run counts as one of the P rows.
    shards: the number of runs at once. seed: of the vectors v.

    Raises TFMQError if no gradient goes back from the output to any of the readers.
    """

    steps: dict[str, Tensor] = {}

    def run(i: int) -> dict[Any, Tensor]:
        own = {
            key: {c: (float(scale[i]), int(zero[i])) for c, (scale, zero) in of.items()}
            for key, of in qparams.items()
        }
        probe = _Probe(gm, readers, own, steps)
        probe.measure(inputs_of(gm, calibration.batch(rows[i])), seed=seed + i)
        return probe.found

    with workers(shards) as threads:
        done = threads.map(run, range(len(rows)))
    if all(found.keys() == {POWER} for found in done):
        raise TFMQError("no gradient goes back from the network's output to its layers.")

    def column(key: Any, *, sizes: tuple[int, ...] = ()) -> Tensor:
        """sizes: of the zeros that stand for what no gradient came back to in any run."""
        none = torch.zeros_like(next((found[key] for found in done if key in found), torch.zeros(sizes)))
        return torch.stack([found.get(key, none) for found in done]).double()

    def ratio(key: Any, candidate: Any) -> float:
        found_P, variance_P = column((key, candidate)), column((key, candidate, VARIANCE))
        return float((found_P / variance_P.clamp_min(1e-30)).mean().clamp_min(1.0))

    return Effects(
        timesteps=torch.stack([calibration.row_timesteps[r[0]] for r in rows]),
        inputs={
            r.input: column(r.input, sizes=(1,)) for r in readers if r.plan.activation_bits != FLOAT_BITS
        },
        correlated={
            r.input: {c: ratio(r.input, c) for c in r.smoothing}
            for r in readers
            if r.plan.activation_bits != FLOAT_BITS
        },
        weights={
            r.plan.path: {
                (c, bits): column((r.plan.path, c, bits)) for c in r.smoothing for bits in r.weight_bits
            }
            for r in readers
        },
        power=column(POWER),
    )


class _Listening(torch.autograd.Function):
    """A view of x that tells the gradient of its own readers, without those of x's others, and copies nothing."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, zero: Tensor, x: Tensor, hear: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.hear, ctx.zero = hear, torch.zeros_like(zero)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.hear(g)
        return ctx.zero, g, None


class _Probe(Interpreter):
    """A run of the float graph that hears the gradient of each quantized input and weight as it comes back.

    steps: path -> the rounding steps of `plain` weights (`_row_steps`), which runs share.
    """

    def __init__(
        self,
        gm: GraphModule,
        readers: Sequence[Reader],
        qparams: Mapping[tuple[str, int], Mapping[Any, tuple[float, int]]],
        steps: dict[str, Tensor],
    ) -> None:
        super().__init__(gm)
        self.readers, self.qparams, self.steps = {r.node: r for r in readers}, qparams, steps
        self.found: dict[Any, Tensor] = {}
        self._heard: dict[Any, Tensor] = {}
        # What is heard depends on it, so that gradients are asked for it alone: the network's parameters get none.
        self._zero = torch.zeros(()).requires_grad_()

    def measure(self, inputs: Sequence[Any], *, seed: int) -> None:
        with torch.enable_grad():
            leaves = pytree.tree_leaves(self.run(*inputs))
            output = next(x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
            # The output's gradient function leads to what is heard, and from there back here: a cycle that nothing would free.
            self._heard.clear()
            self.env.clear()
            if output.requires_grad:
                v = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)
                torch.autograd.grad(output, [self._zero], v, allow_unused=True)
        self.found[POWER] = output.detach().float().square().sum().cpu()

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a parameter without its gradient, so that only what is heard has one."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        reader = self.readers.get(n)
        if reader is None:
            return super().run_node(n)
        kept = {reader.source: self.env[reader.source], reader.weight: self.env[reader.weight]}
        if reader.plan.activation_bits != FLOAT_BITS:
            self.env[reader.source] = self._hear(reader.input, kept[reader.source], reader)
        if reader.weight_bits:
            self.env[reader.weight] = self._hear(reader.plan.path, kept[reader.weight].detach(), reader)
        try:
            return super().run_node(n)
        finally:
            self.env.update(kept)

    def _hear(self, key: Any, x: Tensor, reader: Reader) -> Tensor:
        if key not in self._heard:
            judge = self._judge_input if key == reader.input else self._judge_weight
            hear = partial(judge, reader, x.detach())
            self._heard[key] = _Listening.apply(self._zero, x, hear)  # type: ignore[no-untyped-call]
        return self._heard[key]

    def _judge_input(self, reader: Reader, x: Tensor, g: Tensor) -> None:
        x_NCK, g_NCK = by_channel(x.float(), reader.axis), by_channel(g.float(), reader.axis)
        self.found[reader.input] = energy_C = g_NCK.square().sum((0, 2)).cpu()
        numbers = activation_numbers(reader.plan.activation_bits, reader.plan.dtype)
        for candidate, s_C in reader.smoothing.items():
            scale, zero_point = self.qparams[reader.input][candidate]
            s_C1 = x_NCK.new_ones(1, 1) if s_C is None else s_C[:, None].to(x_NCK)
            error_NCK = fake_quantize(x_NCK / s_C1, scale, zero_point, numbers).mul_(s_C1).sub_(x_NCK)
            self.found[reader.input, candidate] = (
                torch.vdot(error_NCK.flatten(), g_NCK.flatten()).square().cpu()
            )
            variance = (energy_C * s_C1[:, 0].cpu().square()).sum() * scale**2 / 12
            self.found[reader.input, candidate, VARIANCE] = variance.cpu()

    def _judge_weight(self, reader: Reader, w: Tensor, g: Tensor) -> None:
        energy, w, path = g.float().square(), loaded(w).float(), reader.plan.path
        if reader.plain:
            if path not in self.steps:
                self.steps[path] = _row_steps(w, reader)
            found_SB = _plain_effects(energy, reader, self.steps[path]).cpu()
            for candidate, found_B in zip(reader.smoothing, found_SB, strict=True):
                for bits, found in zip(reader.weight_bits, found_B, strict=True):
                    self.found[path, candidate, bits] = found
            return
        for candidate, s_C in reader.smoothing.items():
            scale = 1.0 if s_C is None else reader.by_input(s_C).to(w)
            for bits in reader.weight_bits:
                step = _steps(w * scale, reader, bits) / scale
                self.found[path, candidate, bits] = (step.square() * energy).sum().cpu() / 12


def _row_steps(w: Tensor, reader: Reader) -> Tensor:
    """Return the step (S, B, O) that all weights of an output channel share, by smoothing and bits."""
    found = []
    for s_C in reader.smoothing.values():
        rows = (w if s_C is None else w * reader.by_input(s_C).to(w)).flatten(1)
        numbers = [weight_numbers(bits, reader.plan.dtype) for bits in reader.weight_bits]
        found.append(torch.stack([_scale(rows, n) for n in numbers]))
    return torch.stack(found)


def _scale(rows: Tensor, numbers: NumberRange) -> Tensor:
    """Return the scale (R,) of rows (R, K) of weights, each over its own range."""
    return choose_qparams(rows.amin(1), rows.amax(1), numbers)[0]


def _plain_effects(energy: Tensor, reader: Reader, step_SBO: Tensor) -> Tensor:
    """Return (S, B): the sum over weights of the variance of rounding, step^2 / 12 / s^2, times `energy`."""
    groups = reader.layer.groups if reader.layer else 1
    energy_GOI = energy.flatten(2).sum(2) if energy.dim() > 2 else energy
    energy_GOI = energy_GOI.unflatten(0, (groups, -1))
    ones = energy.new_ones(groups * energy.shape[1])
    inverse_SGI = torch.stack([ones if s is None else s.to(ones).pow(-2) for s in reader.smoothing.values()])
    energy_SO = torch.einsum("goi,sgi->sgo", energy_GOI, inverse_SGI.unflatten(1, (groups, -1))).flatten(1)
    return torch.einsum("so,sbo->sb", energy_SO, step_SBO.square()) / 12


def _steps(w: Tensor, reader: Reader, bits: int) -> Tensor:
    """Return the rounding step of every weight, in the weight's shape, if each row of weights covers its range."""
    moved, numbers = w.movedim(output_channel_axis(reader.node), 0), weight_numbers(bits, reader.plan.dtype)
    rows = moved.reshape(-1, reader.plan.group_size or moved[0].numel())
    scale_R1 = _scale(rows, numbers)[:, None]
    steps = (scale_R1 * numbers.spacing(rows / scale_R1)).expand_as(rows).reshape(moved.shape)
    return steps.movedim(0, output_channel_axis(reader.node))
