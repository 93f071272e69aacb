"""Capture a network on the rows of a calibration set."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tfmq_fx.artefact.interface import Interface
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.signatures import parameters_of, signature_of, with_forward
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.padding import without_padding
from tfmq_fx.capturing.agreement import agree_on_padding, agrees, require_kinds, require_sizes
from tfmq_fx.capturing.interfaces import interface_of
from tfmq_fx.capturing.network import batched, capture
from tfmq_fx.capturing.wrappers import unwrapped
from tfmq_fx.graph.inputs import placeholders, timestep_input
from tfmq_fx.graph.written import keeps_buffers

log = logging.getLogger(__name__)


def described(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[nn.Module, GraphModule, Interface, CalibrationSet]:
    """Capture a network on rows of a calibration set. Return it without wrappers, its graph, how it is called, and what `captured` does."""
    network = unwrapped(network, calibration.arguments(calibration.groups(2)[0], beside=network))
    gm, example, calibration = captured(network, calibration, timestep)
    perturbed, others = calibration.perturbation, calibration.others
    interface = interface_of(
        calibration.row_wise(network), gm, example,
        perturbed=None if perturbed is None else perturbed.to_json(), others=others, stand_ins=calibration.stand_ins, idle=calibration.idle,
    )  # fmt: skip
    return network, gm, interface, calibration


def captured(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any], CalibrationSet]:
    """Capture on rows of the calibration set. Return the graph, the arguments of the capture, and the set as the graph takes it.

    A network that reads the lengths of padded rows as numbers is captured without padding, if it computes the same so.
    """
    try:
        return *_captured(network, calibration, timestep), calibration
    except TFMQError:
        found = captured_without_padding(network, calibration, timestep)
        if found is None:
            raise
        return found


def captured_without_padding(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any], CalibrationSet] | None:
    """Return what `captured` does of a set that is cut to the lengths of its rows; None if the network computes something else so."""
    for zeros in (False, True):
        cut = without_padding(network, calibration, zeros=zeros)
        if cut is not None and (found := _captured_cut(network, cut, calibration, timestep)) is not None:
            return *found, cut
    return None


def _captured_cut(
    network: nn.Module, cut: CalibrationSet, padded: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any]] | None:
    """Return what `_captured` does of rows without padding; None if they cannot be captured, or the graph is not right."""
    try:
        gm, example = _captured(network, cut, timestep)
    except TFMQError as error:
        log.info("%s cannot be captured without padding: %s", type(network).__name__, error)
        return None
    return (gm, example) if agree_on_padding(gm, network, cut, padded) else None


def _captured(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any]]:
    """Return the graph and the arguments of the capture.

    As many rows as no tensor has of anything else (entries, frames), so that the two can be told apart.
    """
    taken = {x.shape[0] for x in calibration.constants.values() if isinstance(x, Tensor) and x.dim()}
    taken |= {size for x in calibration.tensors.values() for size in x.shape[1:]}
    if (sizes := calibration.row_sizes) is not None:
        taken |= {size for of in sizes.of.values() for size in of.unique().tolist()}
        taken |= {len(x) for values in sizes.values.values() for x in values if x.dim()}
    count = next(n for n in itertools.count(2) if n not in taken)
    example = calibration.example(count, beside=network)
    if "return_dict" in parameters_of(network):
        example["return_dict"] = False
    gm, example = capture_rows(calibration.row_wise(network), example, timestep)
    if calibration.others:
        require_kinds(gm, network, calibration)
    if calibration.row_sizes is not None and calibration.row_lists is None:
        require_sizes(gm, network, calibration)
    return gm, example


def capture_rows(
    network: nn.Module, example: dict[str, Any], timestep: str
) -> tuple[GraphModule, dict[str, Any]]:
    """Capture on rows with a timestep each, (N,), or on one timestep, (), if the network takes one per call.

    A network that turns the number of timesteps into a Python number gets its one timestep as (1,), for all rows.

    Returns the graph and the arguments of the capture.
    """
    network, given, _ = batched(network, example, timestep)
    example = dict(given)
    try:
        return capture(network, example, timestep=timestep), example
    except TFMQError:
        if not isinstance(example.get(timestep), Tensor) or example[timestep].dim() != 1:
            raise
        one = {**example, timestep: example[timestep][0]}
        try:
            return capture(network, one, timestep=timestep), one
        except TFMQError:
            pass  # the first error is the one to show
        try:
            gm = capture(_with_one_timestep(network, timestep), one, timestep=timestep)
        except TFMQError:
            gm = None
        if gm is not None and _computes(gm, network, one):
            return gm, example
        raise


def _with_one_timestep(network: nn.Module, timestep: str) -> nn.Module:
    """Return the same network for a timestep of shape (), which it gets as (1,)."""
    signature = signature_of(network)

    def forward(own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments[timestep] = given.arguments[timestep].reshape(1)
        return own(*given.args, **given.kwargs)

    return with_forward(network, forward, signature)


@keeps_buffers
@torch.no_grad()
def _computes(gm: GraphModule, network: nn.Module, one: Mapping[str, Any]) -> bool:
    """Return True if the graph computes what the network does with that timestep for every row.

    One timestep need not be the same as one for each row: a network may read its batch from there.
    """
    found = {n: x for n, (_, x) in leaves(one).items()}
    timestep = str(timestep_input(gm, None).target)
    rows = next(found[n].shape[0] for n in placeholders(gm) if n != timestep and found[n].dim())
    return agrees(gm, found, network, {**one, timestep: found[timestep].expand(rows)})
