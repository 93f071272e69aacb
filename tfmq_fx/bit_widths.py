"""Mixed precision: measure what each layer's bits do to the output, and choose the best bits within a budget.

Every layer is quantized alone, with the rest of the network in float, as HAWQ and its successors do with a
Hessian. The errors of layers are assumed to add up. The error is kept by timestep, so that the harm that a
layer does late or early can be seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.arithmetic import FLOAT_BITS, check_bits, weight_numbers
from tfmq_fx.base.entries import per_sample
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files, update_with_tensors
from tfmq_fx.base.metrics import first_tensor, relative_mse_by_timestep
from tfmq_fx.base.offloaded import usable_device
from tfmq_fx.base.progress import track
from tfmq_fx.calibration.data import CalibrationSet, inputs_of
from tfmq_fx.calibration.pipelines import network_of, require_model
from tfmq_fx.calibration.stage import calibrate, require_set, with_own
from tfmq_fx.calibration.temporal_rows import is_scalar
from tfmq_fx.capturing.calibrated import captured
from tfmq_fx.graph.nodes import attribute, output_channel_axis
from tfmq_fx.graph.written import keeps_buffers
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.clean.offload_weights import offload_weights
from tfmq_fx.passes.quantize.observed import observers, set_mode, without_observers
from tfmq_fx.passes.quantize.plan import LayerPlan
from tfmq_fx.passes.quantize.prepare import prepare
from tfmq_fx.passes.quantize.state import require_stage, state_of
from tfmq_fx.recipe import Recipe, Rule
from tfmq_fx.runtimes.layers import layers_of


class BudgetError(TFMQError):
    """A budget is too small. least: the bytes that would do."""

    def __init__(self, budget: float, least: int, layers: int) -> None:
        self.least = least
        super().__init__(
            f"max_bytes={budget:g}: {layers} layers take {least} bytes at their fewest bits; allow at least that, or "
            "measure fewer bits (widths)."
        )


def weight_bytes(weights: int, rows: int, bits: int) -> int:
    """Return the bytes of a weight in the artefact, with a float32 scale and a zero point of `bits` bits per row."""
    if bits == FLOAT_BITS:
        return 4 * weights
    return -(-weights * bits // 8) - (-rows * bits // 8) + 4 * rows


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """The effect of quantizing one layer alone: relative MSE of the network's output, by timestep."""

    path: str  # its weight's name in the network's state dict
    op: str
    temporal: bool
    weights: int
    rows: int  # of weights that share a scale and a zero point
    flops: int  # for one sample
    weight_errors: dict[int, list[float]]  # by bits, for the widths that the recipe allows here
    activation_errors: list[float]  # of its input, with the recipe's bits; zeros if that is float

    def bytes(self, bits: int) -> int:
        """Return the bytes in the artefact, as `weight_bytes` does."""
        return weight_bytes(self.weights, self.rows, bits)

    def error(self, bits: int) -> float:
        """Return the mean error over the timesteps; 0 for a layer left in float, weight and input."""
        if bits == FLOAT_BITS:
            return 0.0
        pairs = zip(self.weight_errors[bits], self.activation_errors, strict=True)
        return sum(w + a for w, a in pairs) / len(self.activation_errors)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The sensitivities of all measured layers of a network."""

    timesteps: list[float]
    layers: tuple[LayerSensitivity, ...]
    key: str  # a hash of what it was measured on

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Sensitivity:
        layers = [
            LayerSensitivity(
                **{**layer, "weight_errors": {int(b): e for b, e in layer["weight_errors"].items()}}
            )
            for layer in values["layers"]
        ]
        return Sensitivity(timesteps=values["timesteps"], layers=tuple(layers), key=values["key"])

    def bytes(self, bits: Mapping[str, int]) -> int:
        """Return the bytes of these layers' weights in the artefact, including scales and zero points.

        bits: of each layer's weight, by path.
        """
        return sum(layer.bytes(bits[layer.path]) for layer in self.layers)

    def error(self, bits: Mapping[str, int]) -> float:
        """Return the sum of these layers' errors. bits: of each layer's weight, by path."""
        return sum(layer.error(bits[layer.path]) for layer in self.layers)

    def choose(self, *, max_bytes: float, max_float_flops: float = 0.0) -> dict[str, int]:
        """Return the bits of each layer's weight, by path, that give the least error within the budgets.

        16 bits leave the layer in float.

        max_bytes: the budget for the weights of these layers, as `bytes` counts them.
        max_float_flops: the largest share of these layers' multiplications that may be float, 0 to 1. int8
            kernels run 4 and 8 bits equally fast, so only float costs time.

        It starts from the fewest bytes, and always takes the step that reduces the error most per byte (the
        greedy rule for the knapsack problem, exact for its relaxation). Raises BudgetError if nothing fits.
        """
        bits = {layer.path: min(layer.weight_errors) for layer in self.layers}
        least = self.bytes(bits)
        if least > max_bytes:
            raise BudgetError(max_bytes, least, len(self.layers))
        room, float_room = max_bytes - least, max_float_flops * sum(layer.flops for layer in self.layers)
        while True:
            best: tuple[float, LayerSensitivity, int] | None = None
            for layer in self.layers:
                now = bits[layer.path]
                for wider in (*layer.weight_errors, FLOAT_BITS):
                    won = layer.error(now) - layer.error(wider)
                    cost = layer.bytes(wider) - layer.bytes(now)
                    fits = cost <= room and (wider != FLOAT_BITS or layer.flops <= float_room)
                    worth = (
                        won / cost if cost > 0 else math.inf
                    )  # the qparams of few weights take more bytes than float weights
                    if wider > now and won > 0 and fits and (best is None or worth > best[0]):
                        best = (worth, layer, wider)
            if best is None:
                return bits
            _, layer, wider = best
            room -= layer.bytes(wider) - layer.bytes(bits[layer.path])
            float_room -= layer.flops if wider == FLOAT_BITS else 0
            bits[layer.path] = wider


@neutral()
@keeps_buffers
@torch.no_grad()
def sensitivity(
    gm: GraphModule,
    calibration: CalibrationSet,
    *,
    widths: Sequence[int] = (4, 8),
    rows: int = 64,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Sensitivity:
    """Measure each weight at each of `widths` alone, and each layer's input alone.

    gm: a calibrated graph, which is left unchanged.
    widths: the bit widths to measure; float is always compared.
    rows: the number of rows of the calibration set to use, spread over the timesteps.
    seed: of the choice of rows.
    cache: a JSON file that keeps the result. It is read if network, recipe, data and arguments are the same,
        and rewritten if not.

    Weights are rounded to nearest. Layers whose bits a rule gives are left out, and so are widths below what
    the recipe demands of first and last layers.
    """
    require_stage(gm, "calibrated", "reconstructed")
    require_set(calibration)
    _check_widths(widths)
    data = calibration.spread(rows, seed=seed)
    plain = without_observers(gm)
    key = _key(gm, plain, data, widths)
    file = None if cache is None else Path(cache)
    if file is not None and (found := _read(file, key)) is not None:
        return found
    batches = list(data.batches(rows, one_timestep=is_scalar(gm)))
    exact = [first_tensor(plain(*inputs_of(plain, batch))) for batch in batches]
    timesteps = torch.cat([per_sample(batch[data.timestep]) for batch in batches])

    def errors(network: nn.Module) -> list[float]:
        outputs = [first_tensor(network(*inputs_of(plain, batch))) for batch in batches]
        by_timestep = relative_mse_by_timestep(torch.cat(outputs), torch.cat(exact), timesteps)
        return [by_timestep[t] for t in sorted(by_timestep)]

    alone = _Alone(gm)
    flops = {layer.path: layer.flops for layer in layers_of(plain)}
    nodes = {n.name: n for n in plain.graph.nodes}
    layers = []
    for planned in track(_free(gm), "measuring layers"):
        weight = attribute(plain, planned.path)
        weight_errors = {}
        for bits in _widths_of(planned, widths):
            integers = PerChannelWeightFakeQuantize(
                bits=bits,
                ch_axis=output_channel_axis(nodes[planned.node]),
                group_size=planned.group_size,
                dtype=weight_numbers(bits, planned.dtype).dtype,
            )
            integers.initialise(weight)
            weight_errors[bits] = errors(
                _With(plain, {planned.path: integers.dequantized().to(weight.dtype)})
            )
        layers.append(
            LayerSensitivity(
                path=planned.path,
                op=planned.op,
                temporal=planned.temporal,
                weights=weight.numel(),
                rows=integers.scale.numel(),
                flops=flops[planned.path],
                weight_errors=weight_errors,
                activation_errors=errors(alone.quantizing(planned.node)),
            )
        )
    found = Sensitivity(timesteps=sorted(set(timesteps.tolist())), layers=tuple(layers), key=key)
    if file is not None:
        text = json.dumps(found.to_json()) + "\n"
        replace_files(file, lambda path: path.write_text(text))
    return found


def _check_widths(widths: Sequence[int]) -> None:
    for width in widths:
        check_bits(width, "widths")
    if not widths or FLOAT_BITS in widths:
        raise TFMQError(
            f"widths={tuple(widths)}: name integer widths, such as (4, 8); float is always compared."
        )


def _free(gm: GraphModule) -> list[LayerPlan]:
    """Return the layers whose bits no rule gives."""
    return [layer for layer in state_of(gm).plan.layers if not layer.reason.startswith("rule")]


def _widths_of(layer: LayerPlan, widths: Sequence[int]) -> list[int]:
    """Return the widths that the recipe allows a layer, the fewest bits first."""
    lowest = layer.weight_bits if layer.reason else 0
    return sorted(w for w in widths if w >= lowest) or [layer.weight_bits]


def _require_room(gm: GraphModule, widths: Sequence[int], max_bytes: float) -> None:
    """Raise BudgetError if the layers of a prepared graph take more at their fewest bits."""
    layers, least = _free(gm), 0
    axes = {n.name: output_channel_axis(n) for n in gm.graph.nodes if n.name in {x.node for x in layers}}
    for layer in layers:
        weight = attribute(gm, layer.path)
        channels = weight.shape[axes[layer.node]]
        rows = weight.numel() // layer.group_size if layer.group_size else channels
        least += weight_bytes(weight.numel(), rows, _widths_of(layer, widths)[0])
    if least > max_bytes:
        raise BudgetError(max_bytes, least, len(layers))


class _With(nn.Module):
    """A network with some of its parameters replaced."""

    def __init__(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.network, self.tensors = network, tensors

    def forward(self, *inputs: Any) -> Any:
        return torch.func.functional_call(self.network, self.tensors, inputs)


class _Alone:
    """A copy of the prepared graph in which one layer's input is quantized, and nothing else."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm, own = with_own(gm, [observer for _, observer in observers(gm)])
        for observer in own:
            set_mode(observer, observe=False, quantize=False)
        self.observer_of, self.nodes = dict(observers(self.gm)), {n.name: n for n in self.gm.graph.nodes}
        self.on: Any = None

    def quantizing(self, layer: str) -> GraphModule:
        """Return the graph with the input of `layer`, a node's name, quantized."""
        if self.on is not None:
            set_mode(self.on, observe=False, quantize=False)
        source = self.nodes[layer].args[0]
        self.on = self.observer_of.get(source) if isinstance(source, Node) else None
        if self.on is not None:
            set_mode(self.on, observe=False, quantize=True)
        return self.gm


@neutral()
def mixed_precision(
    model: Any,
    recipe: str | Recipe = "w4a8",
    *,
    calibration: CalibrationSet,
    max_bytes: float,
    max_float_flops: float = 0.0,
    widths: Sequence[int] = (4, 8),
    finite: Mapping[str, Iterable[Any] | Tensor] | None = None,
    timestep: str = "timestep",
    component: str | None = None,
    rows: int = 64,
    seed: int = 0,
    cache: str | Path | None = None,
    execution_device: str | torch.device | None = None,
) -> Recipe:
    """Return the recipe with a rule for each layer whose chosen bits differ from the recipe's.

    The result is for `quantize`. Sensitivities are measured without the recipe's low-bit passes.

    model: a pipeline or network, as for `quantize`. The other arguments are those of `quantize`,
        `sensitivity` and `Sensitivity.choose`. Raises TFMQError as those functions do, and for a budget that is too
        small before anything is measured.
    """
    recipe = Recipe.of(recipe)
    require_model(model, component)
    require_set(calibration)
    if not (isinstance(max_bytes, Real) and max_bytes > 0):
        raise TFMQError(f"max_bytes: {max_bytes!r} is not a positive number of bytes.")
    if not (isinstance(max_float_flops, Real) and 0.0 <= max_float_flops <= 1.0):
        raise TFMQError(f"max_float_flops: {max_float_flops!r} is not a share, between 0 and 1.")
    _check_widths(widths)
    device = usable_device(execution_device, "execution_device")
    network = network_of(model, timestep=timestep, component=component)
    plain = dataclasses.replace(recipe, smooth=None, rotate=None, low_rank=None)
    gm, _, calibration = captured(network, calibration, timestep)
    if device is not None:
        offload_weights(gm, device=device)
    prepared = prepare(gm, plain, timesteps=calibration.timesteps, finite=finite)
    _require_room(prepared, widths, max_bytes)
    calibrate(prepared, calibration)
    found = sensitivity(prepared, calibration, widths=widths, rows=rows, seed=seed, cache=cache)
    return with_bits(
        recipe, found.choose(max_bytes=max_bytes, max_float_flops=max_float_flops), state_of(prepared).plan
    )


def with_bits(recipe: Recipe, bits: Mapping[str, int], plan: Any) -> Recipe:
    """Return the recipe with a rule for each layer of `plan` whose bits differ from those in `bits`."""
    rules = [
        Rule(
            pattern="".join(f"[{c}]" if c in "*?[" else c for c in layer.path),
            weight_bits=bits[layer.path],
            activation_bits=FLOAT_BITS if bits[layer.path] == FLOAT_BITS else None,
        )
        for layer in plan.layers
        if bits.get(layer.path, layer.weight_bits) != layer.weight_bits
    ]
    return dataclasses.replace(recipe, rules=(*recipe.rules, *rules))


def _key(gm: GraphModule, plain: GraphModule, data: CalibrationSet, widths: Sequence[int]) -> str:
    recipe = state_of(gm).recipe.to_json()
    recipe.pop("reconstruction")
    digest = hashlib.sha256(json.dumps([recipe, list(widths), torch.__version__]).encode())
    update_with_tensors(digest, sorted({**plain.state_dict(), **data.tensors}.items()))
    return digest.hexdigest()


def _read(file: Path, key: str) -> Sensitivity | None:
    """Return the file's content if it is for this key, else None. Raises TFMQError for any other file."""
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        return Sensitivity.from_json(values) if values["key"] == key else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TFMQError(
            f"{file}: is not a file of sensitivities ({type(error).__name__}: {error}); remove it, or choose another name."
        ) from error
