"""The errors of temporal features whose rows are not dim 0, timestep by timestep."""

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, make, sinusoid
from tests.helpers.nearest import recipe
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
