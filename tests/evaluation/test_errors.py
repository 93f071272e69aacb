"""The errors by timestep: of features whose rows are not dim 0, and of outputs whose rows do not fit at once."""

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, TinyUNet, calibration, captured, make, sinusoid
from tests.helpers.nearest import quantized, recipe
from tfmq_fx.calibration.data import inputs_of
from tfmq_fx.evaluation import errors
from tfmq_fx.graph import inputs
from tfmq_fx.graph.inputs import largest_row
from tfmq_fx.passes import extract_temporal, find_temporal
from tfmq_fx.passes.temporal.partition_temporal import temporal_block_of


class Moved(nn.Module):
    """Frames (N, 3, 4) with an embedding for each sample: (N, 4), (1, N, 4), or (N * 3, 4) as video networks repeat it."""

    def __init__(self):
        super().__init__()
        self.time, self.feature = nn.Linear(8, 16), nn.Linear(16, 4)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        shift = self.moved(torch.tanh(self.time(sinusoid(timestep, 8))))
        return self.head(torch.relu(self.body(sample) + shift))

    def moved(self, h):
        return self.feature(h)[:, None]


class Transposed(Moved):
    def moved(self, h):
        return self.feature(h[None])[0][:, None]


class Repeated(Moved):
    def moved(self, h):
        return self.feature(h.repeat_interleave(3, 0)).unflatten(0, (-1, 3))


@pytest.mark.parametrize("network_class", [Moved, Transposed, Repeated])
@torch.no_grad()
def test_each_timestep_has_its_own_distance(network_class):
    network = make(network_class)
    data = {"sample": torch.randn(20, 3, 4), "timestep": TIMESTEPS.repeat(2)}
    q = tfmq_fx.quantize(
        network, recipe("w4a8"), calibration=tfmq_fx.CalibrationSet.from_tensors(data), timestep="timestep"
    )
    gm = tfmq_fx.capture(network, {n: x[:2] for n, x in data.items()})
    block, quantized = extract_temporal(gm, find_temporal(gm)), temporal_block_of(q.network)
    for row in q.report["errors_by_timestep"]:
        t = torch.tensor([int(row["timestep"])])
        x, y = (b(t)[0].double().flatten() for b in (block, quantized))
        expected = 1 - torch.cosine_similarity(x, y, dim=0)
        assert row["temporal_cosine_distance"] == pytest.approx(float(expected), rel=1e-3, abs=1e-9)
    assert len({row["temporal_cosine_distance"] for row in q.report["errors_by_timestep"]}) > 1


def test_rows_whose_tensors_are_large_are_measured_in_pieces(monkeypatch):
    """As many rows at once as fit: (rows, 16, 8, 8) of float32, the largest tensor, takes 4 KiB a row."""
    gm = captured(TinyUNet)
    assert largest_row(gm) == 16 * 8 * 8 * 4
    converted, data = quantized("w8a8").network, calibration()
    seen = []
    monkeypatch.setattr(
        errors, "inputs_of", lambda gm, batch: seen.append(len(batch["timestep"])) or inputs_of(gm, batch)
    )
    with torch.no_grad():
        whole = errors.errors_by_timestep(gm, converted, data, {}, None)
        monkeypatch.setattr(inputs, "LARGEST", 3 * largest_row(gm))
        pieces = errors.errors_by_timestep(gm, converted, data, {}, None)
    assert seen == [40, *[3] * 13, 1]
    for a, b in zip(whole, pieces, strict=True):
        # A sum of products in another order moves few activations to the next integer.
        assert a == pytest.approx(b, rel=0.05)


@torch.no_grad()
def test_the_float_network_is_not_run_again_on_rows_that_calibration_ran_it_on():
    gm, data = captured(TinyUNet), calibration()
    outputs = dict.fromkeys([3, 17, 30])
    prepared = tfmq_fx.prepare(captured(TinyUNet), recipe("w8a8"), timesteps=TIMESTEPS)
    converted = tfmq_fx.convert(tfmq_fx.calibrate(prepared, data, batch_size=8, outputs=outputs))
    rows = data.rows(torch.tensor([3, 17, 30]))
    expected = gm(rows.tensors["sample"], rows.tensors["timestep"])
    torch.testing.assert_close(torch.cat(list(outputs.values())), expected)
    again = errors.errors_by_timestep(gm, converted, rows, {}, None)
    gm.forward = None  # it must not run
    found = errors.errors_by_timestep(gm, converted, rows, {}, None, list(outputs.values()))
    for a, b in zip(found, again, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_a_large_network_is_measured_on_one_row_of_each_timestep(monkeypatch):
    gm, converted, data = captured(TinyUNet), quantized("w8a8").network, calibration()
    seen = []
    monkeypatch.setattr(
        errors, "inputs_of", lambda gm, batch: seen.append(len(batch["timestep"])) or inputs_of(gm, batch)
    )
    monkeypatch.setattr(errors, "ERROR_FLOPS", 1.0)
    found = errors.measure_errors(gm, converted, data, block=extract_temporal(captured(), find_temporal(gm)))
    assert sum(seen) == len(TIMESTEPS) < len(data)
    assert all("output_relative_mse" in row for row in found.by_timestep)
