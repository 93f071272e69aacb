"""The rows that a block learns on."""

import dataclasses

import pytest
import torch
from torch.fx import Interpreter

import tfmq_fx
from benchmarks.networks.small import FAST, calibration, prepared
from tfmq_fx.calibration.data import inputs_of
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import weight_argument
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.observed import observers, without_observers
from tfmq_fx.reconstruction.spill import Budget, Values
from tfmq_fx.reconstruction.streams import Steps


@pytest.mark.parametrize("method", ["adaround", "gptq"])
def test_no_more_rows_of_the_calibration_set_are_read_at_once_than_a_batch(monkeypatch, method):
    """They may be memory-mapped, and larger than memory."""
    read, batch, gm = [], tfmq_fx.CalibrationSet.batch, prepared()

    def counting(self, rows):
        read.append(len(rows))
        return batch(self, rows)

    monkeypatch.setattr(tfmq_fx.CalibrationSet, "batch", counting)
    for copies in ("rows", "spread"):
        monkeypatch.setattr(tfmq_fx.CalibrationSet, copies, lambda *_a, **_k: pytest.fail("copied"))
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, method=method, tune_iterations=2))
    assert max(read) <= FAST.batch_size
    assert sum(read) >= 2 * 40


def steps_of(gm, budget, *, quantized):
    """Return a run of a whole graph with a stop at each layer, and layer -> the node that is asked for."""
    held, batch = Values(budget), inputs_of(gm, calibration().batch(torch.arange(6)))
    for node, value in zip(placeholders(gm).values(), batch, strict=True):
        held[node] = value
    asked = {n: n.args[0] for n in gm.graph.nodes if weight_argument(n) is not None}
    return Steps(gm, asked, quantized=quantized).on(held), asked, held, batch


def test_a_run_with_stops_sees_the_integers_that_layers_get_on_the_way():
    gm = prepared()
    ways = {n: o for n, o in observers(gm) if isinstance(o, PerChannelWeightFakeQuantize)}
    with Budget(1e12) as budget:
        steps, asked, held, batch = steps_of(gm, budget, quantized=True)
        seen = {}
        for layer, x in asked.items():
            seen[x] = steps.value(x).clone()
            o = ways[layer.args[weight_argument(layer)]]
            o.hold((o.q.int() + 1).clamp(o.numbers.quant_min, o.numbers.quant_max))
        outputs = steps.outputs()
    assert torch.equal(outputs, gm(*batch))
    assert len(held) < 10, "values go after their last use"

    class Watch(Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n in seen:
                assert torch.equal(value, seen.pop(n)), n
            return value

    Watch(gm).run(*batch)
    assert not seen


def test_a_float_run_with_stops_passes_the_observers_over():
    gm = prepared()
    with Budget(1e12) as budget:
        steps, asked, _, batch = steps_of(gm, budget, quantized=False)
        for x in asked.values():
            steps.value(x)
        assert torch.equal(steps.outputs(), without_observers(gm)(*batch))


def test_weights_are_not_rounded_where_values_are_spilled(monkeypatch):
    gm, spilled = prepared(), []
    monkeypatch.setattr(Budget, "spill", lambda _self, x: spilled.append(tuple(x.shape)) or x)
    with Budget(0.0) as budget:
        steps, _, _, batch = steps_of(gm, budget, quantized=True)
        assert torch.equal(steps.outputs(), gm(*batch))
    assert spilled
    assert not set(spilled) & {tuple(o.q.shape) for _, o in observers(gm) if hasattr(o, "q")}
