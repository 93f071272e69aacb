"""Move the difficulty of quantization from the channels of the activations to those of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.channels import (
    ParameterLayer,
    choose_layers,
    outgrow,
    record_changes,
    require_float_graph,
    set_tensor,
)
from tfmq_fx.graph.nodes import aten, set_buffer
from tfmq_fx.graph.origins import Explicit, Origin, find_origins
from tfmq_fx.graph.state import Change, captured_of
from tfmq_fx.passes.pass_manager import CLEANING, declare
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, find_temporal

LEFT = "its smoothing is off"


@declare(after=CLEANING)
def smooth(
    gm: GraphModule,
    *,
    maxima: Mapping[str, Tensor] | Callable[[GraphModule], Mapping[str, Tensor]],
    alpha: float | Mapping[str, float] | Callable[[GraphModule], Mapping[str, float]] = 0.5,
    temporal: TemporalBlock | None = None,
    max_memory: float = 8.0,
) -> PassResult:
    """Smooth every layer outside the temporal block but the first and last.

    SmoothQuant (Xiao et al. 2023, eq. 4):

        linear(x, W)   ==>   linear(x / s, W * s),   s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

    for each input channel j. 1 / s is folded into the producer of x (a norm's affine, a layer's output
    channels), if only views and positively homogeneous operators lie between and nothing else reads these
    channels. Elsewhere one `mul` is inserted before the layers that read x. Layers that share an input, or a
    producer, share s. Reassociation only.

    alpha: of all layers, or of each by its weight's path, or what finds these on the graph. A layer that is missing there
        is not smoothed. Layers that share s take the alpha of the first of them.
    maxima: layer's node name -> max|X_j| over the calibration data (C_in,), or what measures them on the graph;
        see `calibration.stage.input_maxima`.
    max_memory: GiB; if the weights take more, the new ones on the CPU lie in temporary files, mapped to memory.

    The graph's state says what was done to each layer (`low_bits`); a graph that has it stays as it is.
    Raises TFMQError for a prepared graph, for an alpha outside [0, 1], and for a layer whose maxima are
    missing, of another length or not finite.
    """
    require_float_graph(gm, "smooth")
    alpha = alpha(gm) if callable(alpha) else alpha
    for value in alpha.values() if isinstance(alpha, Mapping) else [alpha]:
        if not 0.0 <= value <= 1.0:
            raise TFMQError(
                f"alpha={value}: is not between 0 (weights become even) and 1 (activations become even)."
            )
    if "smooth" in captured_of(gm).low_bits:
        return PassResult(gm, False)
    temporal = temporal or find_temporal(gm)
    maxima = maxima(gm) if callable(maxima) else maxima
    inside = temporal.nodes
    layers, changes = choose_layers(gm, inside, timestep=temporal.timestep)
    _check(layers, maxima)
    mapped = outgrow(layers, max_memory)
    origins, explicit = find_origins(gm, layers, temporal=inside)
    for origin in origins:
        readers = readers_of(origin, layers)
        own = alpha_of(readers[0][0], alpha)
        if own is None:
            changes += [Change(name=layer.path, how="left", reason=LEFT) for layer, _ in readers]
            continue
        s_C = smoothing_scale(readers, maxima, sum(p.channels for p in origin.producers), own)
        for p in origin.producers:
            part_C = s_C[p.start : p.start + p.channels]
            p.rewrite(
                gm,
                lambda rows, part_C=part_C: rows / part_C.to(rows.device)[:, None],  # type: ignore[misc]
                mapped=mapped,
            )
        for layer, numbers in readers:
            _multiply(layer, s_C[numbers], mapped=mapped)
            reason = origin.words + _unused(maxima[layer.node.name])
            changes.append(Change(name=layer.path, how="folded", reason=reason))
    for group in explicit:
        own = alpha_of(group.layers[0], alpha)
        if own is None:
            changes += [Change(name=layer.path, how="left", reason=LEFT) for layer in group.layers]
            continue
        s_C = smoothing_scale(readers_of(group, layers), maxima, len(group.layers[0].by_input()), own)
        path = _insert(group, 1 / s_C)
        for layer in group.layers:
            _multiply(layer, s_C, mapped=mapped)
            reason = group.reason + _unused(maxima[layer.node.name])
            changes.append(Change(name=layer.path, how="explicit", reason=reason, tensors=(path,)))
    record_changes(gm, "smooth", changes)
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, bool(layers))


def _unused(maxima_C: Tensor) -> str:
    """Return words on the input channels that smoothing leaves as they are; "" if there are none."""
    zero = int((maxima_C == 0).sum())
    return f"; {zero} of {len(maxima_C)} input channels are always zero and stay as they are" if zero else ""


def readers_of(
    group: Origin | Explicit, layers: Iterable[ParameterLayer]
) -> list[tuple[ParameterLayer, Tensor]]:
    """Return the layers that share s, each with the numbers (C_in,) of its input channels in s."""
    if isinstance(group, Origin):
        return [(layer, group.read[layer.node]) for layer in layers if layer.node in group.read]
    return [(layer, torch.arange(len(layer.by_input()))) for layer in group.layers]


def alpha_of(layer: ParameterLayer, alpha: float | Mapping[str, float]) -> float | None:
    return alpha.get(layer.path) if isinstance(alpha, Mapping) else alpha


def smoothing_scale(
    readers: Iterable[tuple[ParameterLayer, Tensor]], maxima: Mapping[str, Tensor], count: int, alpha: float
) -> Tensor:
    """Return s (count,) in float64, from the largest |X_j| and |W_j| over the layers that read channel j.

    s is 1 where either is 0.
    """
    x_C, w_C = torch.zeros(2, count, dtype=torch.float64)
    for layer, numbers in readers:
        w_J = layer.by_input().abs().amax(1).double().cpu()
        x_C.scatter_reduce_(0, numbers, maxima[layer.node.name].double().cpu(), "amax")
        w_C.scatter_reduce_(0, numbers, w_J, "amax")
    s_C = x_C.pow(alpha) / w_C.pow(1 - alpha)
    return torch.where((x_C > 0) & (w_C > 0), s_C, 1.0)


def _multiply(layer: ParameterLayer, s_C: Tensor, *, mapped: bool) -> None:
    """Multiply the weight by s, a factor for each input channel."""
    rows = layer.by_input().double()
    set_tensor(layer.gm, layer.path, layer.from_input(rows * s_C.to(rows.device)[:, None]), mapped=mapped)


def _insert(group: Explicit, factor_C: Tensor) -> str:
    """Insert x -> mul(x, factor), along the channels, before these layers; return the path of the factor."""
    first = group.layers[0]
    gm, path = first.gm, f"{first.path}_smooth"
    set_buffer(gm, path, factor_C.to(first.weight).reshape([-1] + [1] * (-group.axis - 1)))
    with gm.graph.inserting_before(first.node):
        scaled = gm.graph.call_function(aten.mul.Tensor, (group.x, gm.graph.get_attr(path)))
    scaled.meta = dict(group.x.meta)
    for layer in group.layers:
        layer.node.update_arg(0, scaled)
    return path


def _check(layers: list[ParameterLayer], maxima: Mapping[str, Tensor]) -> None:
    for layer in layers:
        found, channels = maxima.get(layer.node.name), len(layer.by_input())
        if found is None or found.shape != (channels,) or not torch.isfinite(found).all():
            what = "there are none" if found is None else f"found {tuple(found.shape)}"
            if found is not None and found.shape == (channels,):
                what = "found NaN or infinite ones"
            raise TFMQError(
                f"maxima: {layer.path} (node {layer.node.name}) needs one finite value for each of its {channels} input channels, "
                f"{what}; take them from calibration.stage.input_maxima of this very graph."
            )
