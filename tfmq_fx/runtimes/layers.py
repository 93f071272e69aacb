"""Describe the kernel of every convolution, linear and matmul of a lowered network, alike for all engines."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tfmq_fx.artefact.quantized_graph import QuantizedGraph
from tfmq_fx.base.arithmetic import PAIRS_FIT, centred, saturates
from tfmq_fx.graph.float8 import dequantized
from tfmq_fx.graph.nodes import (
    attribute,
    hinted_shape,
    is_decomposed,
    matmul_inputs,
    op_name,
    weight_argument,
)
from tfmq_fx.passes.int8.integer_weights import SUFFIX
from tfmq_fx.passes.int8.rescale_temporal import DEQUANTIZED
from tfmq_fx.passes.temporal.partition_temporal import BLOCK_NAME


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The kernel that runs one convolution, linear or matmul."""

    path: str  # its weight's name in the network's state dict, or its node's name if it has no weight
    op: str
    kernel: str  # the engine's name for it; "" if it is not among the executed nodes
    precision: str  # of its inputs: "u8", "i8", "bf16", "f32"
    int8: bool
    reason: str  # why it is not int8; "" if it is
    fell_back: bool  # True if its inputs are quantized but it is not int8
    flops: int  # for one sample
    float8: bool = False  # True if it multiplies float8 numbers as such

    @property
    def int8_flops(self) -> int:
        """Return the FLOPs in int8. For an attention, only q by k counts: its probabilities stay in float."""
        return self.int8 * self.flops // (2 if self.op == "scaled_dot_product_attention" else 1)


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """A convolution, linear or matmul of the graph that an engine is given."""

    node: str  # its name in that graph
    weight: str  # the name of its weight's node there
    path: str  # its weight's name in the network's state dict; "" if it has none
    op: str  # "convolution", "linear", ...
    flops: int  # for one sample; a multiplication and an addition count as two
    float_because: str  # why no int8 kernel can run it; "" if both its inputs are quantized
    saturates: bool = False  # True if it stays in float because this CPU's int8 kernels would be wrong
    float8: bool = False  # True if its input or weight is quantized to float8

    def ran_as(self, kernel: str, *, precision: str, int8: bool, reason: str, float8: bool = False) -> Kernel:
        """Return the kernel that ran this layer.

        kernel: the engine's name for it. precision: of its inputs. reason: why it is not int8, "" if it is. float8: True
        if it multiplied float8 numbers.
        """
        return Kernel(
            path=self.path or self.node,
            op=self.op,
            kernel=kernel,
            precision=precision,
            int8=int8,
            reason=reason,
            fell_back=not (int8 or float8) and not self.float_because,
            flops=self.flops,
            float8=float8,
        )


def layers_of(gm: GraphModule) -> Iterator[EngineLayer]:
    """Yield the layers of a quantized graph. Its nodes must have the shapes of capture."""
    for node in gm.graph.nodes:
        index = weight_argument(node)
        operands = matmul_inputs(node)
        if index is None and not operands:
            continue
        reasons = []
        path = ""
        if index is not None:
            operands = [node.args[0]]
            path = path_of(node)
            if not _is_quantized_weight(node.args[index]):
                reasons.append("its weight is float")
        if any(not _is_quantized(x) for x in operands):
            reasons.append("its input is float" if index is not None else "its operands are float")
        operands = operands if index is None else [*operands, node.args[index]]
        yield EngineLayer(
            node=node.name,
            weight="" if index is None else node.args[index].name,
            path=path,
            op=op_name(node),
            flops=_flops(node),
            float_because=" and ".join(reasons),
            float8=any(dequantized(x) for x in operands),
        )


def path_of(layer: Any) -> str:
    """Return the name in the network's state dict of the weight of a convolution or linear."""
    return _weight_path(layer.args[weight_argument(layer)]).removesuffix(SUFFIX).removesuffix("_q")


def _weight_path(weight: Node) -> str:
    """Return the path of the constant that a weight is computed from.

    It is the first argument of the first argument, and so on. "" if there is none.
    """
    while weight.op != "get_attr" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    path = str(weight.target) if weight.op == "get_attr" else ""
    return path.removeprefix(
        f"{BLOCK_NAME}."
    )  # the block's parameters lie beside the others in the state dict


def _is_quantized_weight(weight: Node) -> bool:
    """Return True for a weight made of integers, by a dequantization or in the form of `integer_weights`."""
    while weight.op != "get_attr" and weight.all_input_nodes and not _is_quantized(weight):
        weight = weight.all_input_nodes[0]
    return _is_quantized(weight) or (weight.op == "get_attr" and str(weight.target).endswith(SUFFIX))


def _is_quantized(x: Node) -> bool:
    is_integer = (is_decomposed(x) and op_name(x).startswith("dequantize")) or bool(x.meta.get(DEQUANTIZED))
    return is_integer or dequantized(x) is not None


def _flops(node: Node) -> int:
    """Return the FLOPs for one sample: 2 * summed elements * outputs; two matmuls for an attention."""
    x, y = hinted_shape(node.args[0]), hinted_shape(node)
    index = weight_argument(node)
    if index is not None:
        weight = hinted_shape(node.args[index])
        summed = torch.Size(weight).numel() // (weight[1] if op_name(node) == "conv_transpose" else weight[0])
        return 2 * summed * torch.Size(y).numel() // y[0]
    if op_name(node) == "scaled_dot_product_attention":
        keys = hinted_shape(node.args[1])[-2]
        return 2 * keys * (x[-1] + y[-1]) * torch.Size(y[:-1]).numel() // y[0]
    return 2 * x[-1] * torch.Size(y).numel() // y[0]


def needs_sizes(model: QuantizedGraph) -> bool:
    """Return True if the int8 form is one for known sizes of the inputs alone.

    A zero point for each timestep is subtracted as a multiple of the layer's output for ones, which has borders.
    """
    own = [layer for layer in model.report.get("layers", ()) if layer["key"] and not layer["temporal"]]
    return bool(own) and model.recipe.get("shared_zero_point") is False


ops = torch.ops.quantized_decomposed


def quantized_layers(gm: GraphModule) -> list[Node]:
    """Return the convolutions and linears with quantized weights and inputs, after `rescale_temporal`."""
    pairs = (ops.dequantize_per_tensor.default, ops.dequantize_per_token.default)
    found = []
    for node in gm.graph.nodes:
        weight = _dequantized_weight(node)
        if weight is not None:
            x = node.args[0]
            found += [node] if x.target in pairs or x.meta.get(DEQUANTIZED) else []
    return found


FLOAT8_IN_FLOAT = "it multiplies float8_e4m3fn, for which there is no kernel: the same numbers run in float"


def float8_layers(gm: GraphModule) -> list[Node]:
    """Return the linears whose input is quantized to float8, and their weights to float8 or integers."""
    found = []
    for node in gm.graph.nodes:
        index = weight_argument(node)
        if index is not None and dequantized(node.args[0]) and _is_quantized_weight(node.args[index]):
            found.append(node)
    return found


def float8_because(layers: Sized) -> str:
    """Return the end of a sentence on these layers, of float8, that run in float; "" if there are none."""
    return f"; {len(layers)} multiply float8_e4m3fn, for which there is no kernel" if len(layers) else ""


def _dequantized_weight(layer: Any) -> Any:
    """Return the node that dequantizes a layer's weight; None for a float weight and for other nodes."""
    index = weight_argument(layer)
    if index is None:
        return None
    weight = layer.args[index]
    while op_name(weight) in ("view", "reshape"):  # groups
        weight = weight.args[0]
    return weight if weight.target is ops.dequantize_per_channel.default else None


def saturating_layers(gm: GraphModule) -> list[Node]:
    """Return the quantized layers that saturate in kernels of unsigned by signed bytes on x86 without VNNI.

    See `PAIRS_FIT`.
    """
    found = []
    for layer in quantized_layers(gm):
        weight = _dequantized_weight(layer)
        if weight not in layer.args:  # layers with scales per group run in float everywhere
            continue
        q, zero_point = (attribute(gm, str(weight.args[i].target)) for i in (0, 2))
        if saturates(centred(q, zero_point, weight.args[3])):
            found.append(layer)
    return found


def saturating_products(gm: GraphModule) -> list[Node]:
    """Return the products of two quantized activations that saturate on x86 without VNNI; see `PAIRS_FIT`."""
    found = []
    for node in gm.graph.nodes:
        operands: list[Any] = [
            x for x in matmul_inputs(node) if x.target is ops.dequantize_per_tensor.default
        ]
        if any(
            max(high - zero, zero - low) > PAIRS_FIT for zero, low, high in (x.args[2:5] for x in operands)
        ):
            found.append(node)
    return found
