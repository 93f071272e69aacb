"""A trained network from outside: the one-step terrain UNet of the wheel adaptive-terrain-diffusion (MIT).

The wheel ships it as ONNX: 10.5 M weights, heights of 128x128 from `noisy`, its noise level `sigma`, and a
`difficulty`. It is read into a torch module here. The weights are not kept in this repository.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks.wheels import wheel_file

WHEEL = "adaptive-terrain-diffusion==0.4.2"
MEMBER = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
CACHE = Path.home() / ".cache" / "terrain"
SIZE, HIGHEST, LOWEST, LEVELS = 128, 80.0, 0.02, 8
NAMES = ("noisy", "sigma", "difficulty")
Rows = tuple[Tensor, Tensor, Tensor]  # in the order of NAMES


def onnx_file(cache: Path = CACHE) -> Path:
    """Return the network's file. The first call downloads the wheel."""
    return wheel_file(WHEEL, MEMBER, cache)


class Terrain(nn.Module):
    """The ONNX graph, node by node. Weights are parameters under their ONNX names, with "_" for other characters."""

    def __init__(self, file: Path | None = None) -> None:
        super().__init__()
        graph = onnx.load(file or onnx_file()).graph
        self.output = graph.output[0].name
        self.parameter_of: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        for tensor in graph.initializer:
            value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            if value.is_floating_point() and value.dim():
                name = "".join(c if c.isalnum() else "_" for c in tensor.name)
                self.parameter_of[tensor.name] = name
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                self.constants[tensor.name] = _plain(value)
        self.steps = []
        for node in graph.node:
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                value = torch.from_numpy(numpy_helper.to_array(given["value"]).copy())
                self.constants[node.output[0]] = _plain(value)
            else:
                given["outputs"] = len(node.output)
                self.steps.append((node.op_type, list(node.input), list(node.output), given))

    def forward(self, noisy: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
        """noisy (N, 1, 128, 128); sigma (N,); difficulty (N,), in 0..1. Returns the heights (N, 1, 128, 128)."""
        values: dict[str, Any] = {"noisy": noisy, "sigma": sigma, "difficulty": difficulty, **self.constants}
        values |= {onnx_name: getattr(self, name) for onnx_name, name in self.parameter_of.items()}
        for op, inputs, outputs, given in self.steps:
            found = OPERATORS[op]([values[i] if i else None for i in inputs], given)
            found = found if op == "Split" else [found]
            values.update(zip(outputs, found, strict=True))
        result: Tensor = values[self.output]
        return result


def _plain(value: Tensor) -> Any:
    """Return a list of integers, or a number; a tensor for floats with dimensions."""
    if value.is_floating_point():
        return value if value.dim() else value.item()
    return value.reshape(-1).tolist()


def _ints(x: Any) -> list[int]:
    """Return sizes as a list. Those of a graph may be symbolic, and stay so."""
    return [int(i) for i in x.reshape(-1).tolist()] if isinstance(x, Tensor) else list(x)


def _conv(x: list[Any], given: dict[str, Any]) -> Tensor:
    dims = x[0].dim() - 2
    pads = given.get("pads", [0, 0] * dims)
    convolve = {1: F.conv1d, 2: F.conv2d}[dims]
    y: Tensor = convolve(
        x[0], x[1], x[2] if len(x) > 2 else None, stride=tuple(given.get("strides", [1] * dims)),
        padding=tuple(pads[:dims]), groups=given.get("group", 1),
    )  # fmt: skip
    return y


def _reshape(x: list[Any], _given: dict[str, Any]) -> Any:
    if isinstance(x[0], list):  # of a shape
        return x[0]
    return x[0].reshape([x[0].shape[i] if s == 0 else s for i, s in enumerate(_ints(x[1]))])


def _unsqueeze(x: list[Any], _given: dict[str, Any]) -> Any:
    y = x[0]
    for dim in _ints(x[1]) if isinstance(y, Tensor) else []:
        y = y.unsqueeze(dim)
    return y


def _squeeze(x: list[Any], _given: dict[str, Any]) -> Any:
    return x[0].squeeze(_ints(x[1])[0]) if isinstance(x[0], Tensor) else x[0]


def _concat(x: list[Any], given: dict[str, Any]) -> Any:
    if any(isinstance(i, list) for i in x):
        return [n for i in x for n in _ints(i)]
    return torch.cat(x, given["axis"])


def _split(x: list[Any], given: dict[str, Any]) -> Sequence[Any]:
    if len(x) == 1:
        return torch.chunk(x[0], given["outputs"], given.get("axis", 0))
    sizes = _ints(x[1])
    if isinstance(x[0], list):
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [x[0][end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return torch.split(x[0], sizes, given.get("axis", 0))


def _two(combine: Callable[[Any, Any], Any]) -> Callable[[list[Any], dict[str, Any]], Any]:
    """Return an operator of two tensors, or of two sizes, which are lists of one integer."""

    def run(x: list[Any], _given: dict[str, Any]) -> Any:
        if any(isinstance(i, list) for i in x):
            return [combine(*(i[0] if isinstance(i, list) else int(i) for i in x))]
        return combine(*x)

    return run


def _one(function: Callable[[Tensor], Tensor]) -> Callable[[list[Any], dict[str, Any]], Tensor]:
    return lambda x, _given: function(x[0])


def _number(x: Any) -> Any:
    return float(x.reshape(())) if isinstance(x, Tensor) and x.numel() == 1 else x


OPERATORS: dict[str, Callable[[list[Any], dict[str, Any]], Any]] = {
    "Conv": _conv,
    "Gemm": lambda x, _: F.linear(*x),  # all have transB = 1
    "Shape": lambda x, given: list(x[0].shape)[given.get("start", 0) : given.get("end")],
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Split": _split,
    "InstanceNormalization": lambda x, given: F.instance_norm(
        x[0], weight=x[1], bias=x[2], eps=given.get("epsilon", 1e-5)
    ),
    "Einsum": lambda x, given: torch.einsum(given["equation"].decode(), *x),
    "Softmax": lambda x, given: torch.softmax(x[0], given.get("axis", -1)),
    "AveragePool": lambda x, given: F.avg_pool2d(x[0], given["kernel_shape"], given["strides"]),
    "Resize": lambda x, _: F.interpolate(x[0], scale_factor=2.0, mode="nearest"),
    "Clip": lambda x, _: torch.clamp(x[0], *(_number(i) for i in x[1:])),
    "Pow": lambda x, _: x[0] ** _number(x[1]),
    "Mul": _two(lambda a, b: a * b),
    "Add": _two(lambda a, b: a + b),
    "Sub": _two(lambda a, b: a - b),
    "Div": _two(lambda a, b: a / b if isinstance(a, Tensor) else a // b),
    "Sigmoid": _one(torch.sigmoid),
    "Reciprocal": _one(torch.reciprocal),
    "Sqrt": _one(torch.sqrt),
    "Log": _one(torch.log),
    "Cos": _one(torch.cos),
    "Sin": _one(torch.sin),
}


def sigmas() -> Tensor:
    """Return the noise levels (8,), from 80 to 0.02, evenly in their logarithm."""
    return torch.tensor([HIGHEST * (LOWEST / HIGHEST) ** (i / (LEVELS - 1)) for i in range(LEVELS)])


@torch.no_grad()
def rows(network: nn.Module, count: int, *, seed: int) -> Rows:
    """Return `count` terrains that the network draws from noise, noised anew at each of the 8 levels (8 * count rows)."""
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(count, generator=generator)

    def noise() -> Tensor:
        return torch.randn(count, 1, SIZE, SIZE, generator=generator)

    clean = network(noise() * HIGHEST, torch.full((count,), HIGHEST), difficulty)
    noisy = torch.cat([clean + sigma * noise() for sigma in sigmas()])
    return noisy, sigmas().repeat_interleave(count), difficulty.repeat(LEVELS)


@torch.no_grad()
def outputs(network: Callable[..., Tensor], given: Rows, batch_size: int = 4) -> Tensor:
    batches = zip(*(x.split(batch_size) for x in given), strict=True)
    return torch.cat([network(*batch).float() for batch in batches])


def psnr_by_sigma(found: Tensor, expected: Tensor) -> list[float]:
    """Return the PSNR at each of the 8 levels, in dB, of heights in -1..1."""
    errors = (found - expected).square().reshape(LEVELS, -1).mean(1)
    return [10 * math.log10(4 / max(e, 1e-12)) for e in errors.tolist()]
