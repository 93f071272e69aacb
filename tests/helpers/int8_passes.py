"""Graphs for targets with int8 kernels, and checks of what a pass may do to them."""

from collections import Counter

import torch
from torch import nn

from benchmarks.networks.small import Tokens
from tests.helpers.agreement import assert_same_but_for_flips
from tests.helpers.exported import quantized, rows
from tfmq_fx.artefact import program
from tfmq_fx.base.arithmetic import IntegerRange, choose_qparams, quantize_rows
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import rescale_temporal


def graph(network_class=Tokens, **changes):
    model, _ = quantized(network_class, "w4a8", **changes).with_fixed_sizes()  # what unfolding needs
    gm = program.exported(model).module(check_guards=False)
    gm.meta = {}
    rescale_temporal(gm)
    return gm


def targets(gm):
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


QDQ = "quantized_decomposed"
ops = torch.ops.quantized_decomposed
T, BITS = 5, IntegerRange.activation(8)


class Keyed(nn.Module):
    """An activation with one row of qparams per step before `layer`. With `twice`, sin reads it, too."""

    def __init__(self, layer, *, bits=8, scalar=False, twice=False, zero_points=(0, 17, 128, 200, 255)):
        super().__init__()
        weight = layer.weight.detach()
        self.axis = 1 if "Transpose" in type(layer).__name__ else 0
        self.weights = IntegerRange.weight(bits)
        rows = weight.movedim(self.axis, 0).flatten(1)
        self.scale, self.zero_point = (
            nn.Buffer(b) for b in choose_qparams(rows.amin(1), rows.amax(1), self.weights)
        )
        self.q = nn.Buffer(quantize_rows(weight, self.scale, self.zero_point, self.weights, self.axis))
        self.scales = nn.Buffer(torch.linspace(0.01, 0.03, T))
        self.zero_points = nn.Buffer(torch.tensor(zero_points, dtype=torch.int32))
        self.bias, self.layer, self.scalar, self.twice = layer.bias, layer, scalar, twice

    def forward(self, x, step):
        s, z = self.scales.index_select(0, step), self.zero_points.index_select(0, step)
        if self.scalar:
            limits = (0, 255, torch.uint8)
            q = ops.quantize_per_tensor.tensor(x, s, z, *limits)
            y = ops.dequantize_per_tensor.tensor(q, s, z, *limits)
        else:
            limits = (0, 0, 255, torch.uint8)
            q = ops.quantize_per_channel.default(x, s, z, *limits)
            y = ops.dequantize_per_channel.default(q, s, z, *limits)
        w = self.weights
        weight = ops.dequantize_per_channel.default(
            self.q, self.scale, self.zero_point, self.axis, w.quant_min, w.quant_max, w.dtype
        )
        if isinstance(self.layer, nn.Linear):
            out = nn.functional.linear(y, weight, self.bias)
        elif isinstance(self.layer, nn.ConvTranspose2d):
            out = nn.functional.conv_transpose2d(y, weight, self.bias, self.layer.stride, self.layer.padding)
        else:
            out = nn.functional.conv2d(y, weight, self.bias, self.layer.stride, self.layer.padding)
        return (out, torch.sin(y)) if self.twice else out


def graph_of(module, x, step):
    dynamic = [
        {0: torch.export.Dim.AUTO},
        {0: torch.export.Dim.AUTO} if step.dim() and len(step) > 1 else None,
    ]
    with torch.no_grad():
        program = torch.export.export(module.eval(), (x, step), dynamic_shapes=dynamic, strict=False)
        return program.module(check_guards=False)


def operators(gm):
    return [op_name(n) for n in gm.graph.nodes if n.op == "call_function"]


LINEAR = (nn.Linear(6, 4), (6,))


@torch.no_grad()
def assert_the_values_stay(gm, change, before, after):
    """Assert that the pass `change` turns the operators `before` into `after`, and keeps the values.

    Flips at rounding ties are allowed. A second run must change nothing.
    """
    batches = [rows(n) for n in (2, 33)]
    expected = [gm(**batch) for batch in batches]
    found = targets(gm)
    assert {op: found[op] for op in before} == before
    assert change(gm).modified
    got = [gm(**batch) for batch in batches]
    assert_same_but_for_flips(list(zip(got, expected, strict=True)))
    found = targets(gm)
    assert {op: found[op] for op in after} == after
    assert not change(gm).modified
    return got, expected


def pair(x, scale=0.05, zero_point=120):
    """Quantize and dequantize x as an activation of signed bytes, `zero_point` counted from -128."""
    given = (scale, zero_point - 128, -128, 127, torch.int8)
    return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *given), *given)


class Weighted(nn.Module):
    """A layer with a quantized weight of `bits`; it is given x by whoever calls it."""

    def __init__(self, layer, bits=4):
        super().__init__()
        self.weights = IntegerRange.weight(bits)
        rows = layer.weight.detach().flatten(1)
        self.scale, self.zero_point = (
            nn.Buffer(b) for b in choose_qparams(rows.amin(1), rows.amax(1), self.weights)
        )
        self.q = nn.Buffer(quantize_rows(layer.weight.detach(), self.scale, self.zero_point, self.weights, 0))
        self.bias, self.layer = layer.bias, layer

    def forward(self, x):
        w, layer = self.weights, self.layer
        weight = ops.dequantize_per_channel.default(
            self.q, self.scale, self.zero_point, 0, w.quant_min, w.quant_max, w.dtype
        )
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(x, weight, self.bias)
        place = (layer.stride, layer.padding, layer.dilation, layer.groups)
        convolve = nn.functional.conv1d if isinstance(layer, nn.Conv1d) else nn.functional.conv2d
        return convolve(x, weight, self.bias, *place)


class Float(nn.Module):
    """A layer as `exported_batch` takes it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *x):
        return self.layer(x[0])


def exported_batch(module, *inputs):
    """Return the graph of a module whose inputs' first dimension, two in the example, may have any size."""
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    with torch.no_grad():
        exported = torch.export.export(module.eval(), inputs, dynamic_shapes=(dynamic,), strict=False)
        gm = exported.module(check_guards=False)
    gm.meta = {}
    return gm
