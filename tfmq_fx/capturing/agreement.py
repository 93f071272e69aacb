"""Compare a captured graph with its network: whether it computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.interface import VARIANT
from tfmq_fx.base.ambient import has_values
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.rounding import within_rounding
from tfmq_fx.base.row_lists import run
from tfmq_fx.calibration.data import CalibrationSet, as_taken
from tfmq_fx.calibration.temporal_rows import is_scalar
from tfmq_fx.calibration.variants import Variants
from tfmq_fx.graph.inputs import placeholders, timestep_input
from tfmq_fx.graph.written import keeps_buffers

REROUTED = 32.0  # times as much where tokens choose experts: of two that are as good as equal, rounding takes the other
MOST_TRIALS = 6  # calls at other sizes of a row, for each dimension


def as_dict(output: Any) -> Any:
    """Return an output as a dict if it is a dataclass that torch.export does not know."""
    known = isinstance(output, (Mapping, tuple, list))
    if known or not dataclasses.is_dataclass(output) or isinstance(output, type):
        return output
    return {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}


def rows_of(example: Mapping[str, Any], timestep: str) -> int:
    """Return the number of rows of an example: that of its first tensor other than the timestep, the noisy sample."""
    found = {n: x for n, (_, x) in leaves(example).items() if isinstance(x, Tensor)}
    return next((x.shape[0] for n, x in found.items() if n != timestep and x.dim()), 0)


@keeps_buffers
@torch.no_grad()
def agree(
    gm: GraphModule,
    inputs: Mapping[str, Any],
    network: nn.Module,
    arguments: Mapping[str, Any],
    *,
    share: float = 1.0,
) -> bool:
    """Return True if the graph makes of its inputs, by name, what the network makes of its arguments; without values, in shape alone.

    share: how many times the rounding of sums in another order they may differ.
    """
    try:
        expected = pytree.tree_leaves(as_dict(run(network, arguments)))
    except (DynamicOutputShapeException, DataDependentOutputException):
        return True  # of fake tensors, whose values decide the shapes inside: there is nothing to compare
    return alike(pytree.tree_leaves(gm(*[inputs[n] for n in placeholders(gm)])), expected, share=share)


def alike(made: Sequence[Any], expected: Sequence[Any], *, share: float = 1.0) -> bool:
    """Return True if the tensors of two outputs are the same but for rounding; without values, in shape alone. share: see `agree`."""
    return all(
        within_rounding(a, b, share=share) if has_values(b) else a.shape == b.shape
        for a, b in zip(made, expected, strict=True)
        if isinstance(b, Tensor)
    )


def agrees(
    gm: GraphModule,
    inputs: Mapping[str, Any],
    network: nn.Module,
    arguments: Mapping[str, Any],
    *,
    share: float = 1.0,
) -> bool:
    """Return `agree`; False if the network or the graph cannot compute it."""
    try:
        return agree(gm, inputs, network, arguments, share=share)
    except Exception:  # of any type, at a size that they do not take
        return False


def agree_on_other_rows(
    gm: GraphModule, network: nn.Module, inputs: Mapping[str, Any], *, share: float
) -> bool:
    """Return True if they agree where all rows differ: what mixes rows may make the same of equal ones, as an example may have."""
    rows = rows_of(inputs, str(timestep_input(gm, None).target))

    def other(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.shape[:1] != (rows,) or not x.is_floating_point():
            return x
        return x * (1 + torch.arange(rows, device=x.device).to(x.dtype).view(-1, *[1] * (x.dim() - 1)) / 4)

    changed = pytree.tree_map(other, dict(inputs))
    return agrees(gm, {n: x for n, (_, x) in leaves(changed).items()}, network, changed, share=share)


def agree_on_padding(
    gm: GraphModule, network: nn.Module, cut: CalibrationSet, padded: CalibrationSet
) -> bool:
    """Return True if the graph computes of rows of each length, without padding, what the network does of the padded ones."""
    return _unlike(gm, network, cut, padded) is None


def require_sizes(gm: GraphModule, network: nn.Module, calibration: CalibrationSet) -> None:
    """Raise TFMQError unless the graph computes rows of all sizes as the network does."""
    if (rows := _unlike(gm, network, calibration, calibration)) is None:
        return
    sizes = calibration.row_sizes
    assert sizes is not None
    shown = [f"{n} {tuple(x[rows][0].tolist())}" for n, x in sizes.of.items()]
    shown += [f"{n} {tuple(sizes.taken(n, rows).shape)}" for n in sizes.shared]
    raise TFMQError(
        f"{type(network).__name__}: its graph does not compute what it does for rows of other sizes than those of the capture "
        f"({', '.join(shown)}); record prompts of one length, or padded to one, and pictures of one size."
    )


def _unlike(
    gm: GraphModule, network: nn.Module, cut: CalibrationSet, padded: CalibrationSet
) -> Tensor | None:
    """Return rows of the first kind, of some, of which the graph computes something else than the network of the same padded rows."""
    assert cut.row_sizes is not None
    kinds = cut.row_sizes.kinds
    for rows in [(kinds == kind).nonzero()[:2, 0] for kind in kinds.unique()[:MOST_TRIALS]]:
        for alike in cut.groups(2, rows=rows, one_timestep=is_scalar(gm)):
            found = _inputs(gm, cut.arguments(alike, beside=network))
            if not agrees(gm, found, padded.row_wise(network), padded.arguments(alike, beside=network)):
                return alike
    return None


def _inputs(gm: GraphModule, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among a network's arguments as the graph takes them, by name."""
    return {n: as_taken(gm, n, x) for n, (_, x) in leaves(arguments).items() if isinstance(x, Tensor)}


def require_kinds(gm: GraphModule, network: nn.Module, calibration: CalibrationSet) -> None:
    """Raise TFMQError unless the graph computes a row of each kind of calls, beside the others, as the network does."""
    row_wise, kinds = calibration.row_wise(network), calibration.tensors[VARIANT]
    firsts = torch.stack([(kinds == kind).nonzero()[0, 0] for kind in kinds.unique()])
    for rows in calibration.groups(len(firsts), rows=firsts, one_timestep=is_scalar(gm)):
        arguments = calibration.rows(rows).arguments(slice(None), beside=network, rows_first=True)
        if not agree(gm, _inputs(gm, arguments), row_wise, arguments):
            names = ", ".join(Variants(calibration.others, calibration.paths).names)
            raise TFMQError(
                f"{type(network).__name__}: computes rows with other values of {names} in a way that cannot be told row by row; "
                "change the pipeline's arguments so that they stay the same."
            )


def equal_lists(example: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    return {n: x for n, x in example.items() if isinstance(x, (list, tuple)) and _all_equal(x)}


def _all_equal(values: Sequence[Any]) -> bool:
    """Return True for a list of the same plain values, without tensors."""
    plain = not any(isinstance(x, Tensor) for x in pytree.tree_leaves(values))
    return bool(values) and plain and all(x == values[0] for x in values)
