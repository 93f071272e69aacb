"""A second opinion on the temporal block: perturb one input at a time and watch which layers' outputs change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks.zoo.entry import Entry

WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def flat(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors among `inputs`, nested names joined by "_". Lists of them are one for each sample, and stacked."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}_")
        elif isinstance(value, Tensor):
            found[prefix + name] = value
        elif _is_list(value):
            found[prefix + name] = torch.stack(value)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, Tensor) and x.dim() > 1 for x in value)


def _replace(inputs: Mapping[str, Any], values: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    return {
        name: _replace(value, values, f"{prefix}{name}_")
        if isinstance(value, Mapping)
        else list(values[prefix + name])
        if _is_list(value)
        else values.get(prefix + name, value)
        for name, value in inputs.items()
    }


def _perturbed(x: Tensor) -> Tensor:
    """Other values of the same kind: integers stay in their range, positive numbers stay positive."""
    if x.dtype == torch.bool:
        return ~x
    if not x.is_floating_point():
        return torch.where(x > 0, x - 1, x + 1)
    # No affine map: a normalization behind the input would undo one.
    wave = 1 + 0.5 * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
    return x * (1 + 0.2 * wave) + 0.1 * wave


@contextmanager
def _recording(
    network: nn.Module, weighted: tuple[type[nn.Module], ...]
) -> Iterator[dict[str, list[Tensor]]]:
    """Every weighted layer's outputs, call by call, by module path."""
    outputs: dict[str, list[Tensor]] = {}

    def cast(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # A sinusoid is float32 whatever the network is.
        dtype = next(layer.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def record(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _layer, _args, output: outputs[path].append(output.detach().clone())

    handles = []
    for path, layer in network.named_modules():
        if isinstance(layer, weighted):
            outputs[path] = []
            handles.append(layer.register_forward_pre_hook(cast))
            handles.append(layer.register_forward_hook(record(path)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _differ(a: list[Tensor], b: list[Tensor]) -> bool:
    if [x.shape for x in a] != [y.shape for y in b]:  # an expert has other tokens
        return True
    # Far above float64's rounding, far below what any real dependence does to a random network.
    return any(
        float((x - y).abs().max()) > 1e-9 * (1 + float(x.abs().max())) for x, y in zip(a, b, strict=True)
    )


@torch.no_grad()
def depends(
    entry: Entry, network: nn.Module, *, weighted: tuple[type[nn.Module], ...] = WEIGHTED
) -> dict[str, frozenset[str]]:
    """For each weighted layer of the reduced network, the inputs whose values change its output.

    Input names are flat, as in `Entry.keys`. A layer that never runs depends on nothing. weighted: the classes of layers.
    """
    network = copy.deepcopy(network).double().eval()  # in float64 a change is not mistaken for rounding
    inputs = entry.inputs(False)
    base = {name: x.double() if x.is_floating_point() else x for name, x in flat(inputs).items()}

    def run(values: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        with _recording(network, weighted) as outputs:
            network(**_replace(inputs, values))
        return outputs

    reference = run(base)
    found: dict[str, set[str]] = {path: set() for path in reference}
    for name, value in base.items():
        for path, outputs in run({**base, name: _perturbed(value)}).items():
            if _differ(reference[path], outputs):
                found[path].add(name)
    return {path: frozenset(names) for path, names in found.items()}
