"""Buffers that a network updates: the user's stay as they are, and what no longer updates them says so."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import tfmq_fx
from benchmarks.networks.small import make
from tests.helpers.lowered import lower
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.written import keeps_buffers, written_buffers

NEAREST = tfmq_fx.Reconstruction(method="nearest")
X, T = torch.ones(2, 6, 4), torch.tensor([900, 300])


class Running(nn.Module):
    """Its output reads a running mean and a count, which it updates through a view and in place."""

    def __init__(self):
        super().__init__()
        self.time, self.inner, self.middle, self.outer = (
            nn.Linear(i, o) for i, o in ((1, 8), (4, 8), (8, 8), (8, 4))
        )
        self.mean, self.fixed = nn.Buffer(torch.zeros(2, 8)), nn.Buffer(torch.ones(8))

    def forward(self, sample, timestep):
        h = self.inner(sample) + self.time(timestep.float().reshape(-1, 1) / 1000)[:, None]
        self.mean[0].mul_(0.9).add_(0.1 * h.mean((0, 1)))
        return self.outer(self.middle((h - self.mean[0] * self.fixed).relu()).relu())


def data():
    steps = torch.arange(0, 1000, 100).repeat(2)
    return tfmq_fx.CalibrationSet.from_tensors({"sample": 1 + torch.randn(20, 6, 4), "timestep": steps})


def quantized(network, **changes):
    settings = {"reconstruction": NEAREST, **changes}
    return tfmq_fx.quantize(network, dataclasses.replace(tfmq_fx.Recipe(), **settings), calibration=data())


def test_only_what_a_graph_writes_is_found():
    network = make(Running)
    gm = tfmq_fx.capture(network, {"sample": X, "timestep": T})
    assert list(written_buffers(gm)) == ["mean"]
    assert gm.mean is not network.mean
    assert gm.fixed is network.fixed


@pytest.mark.parametrize(
    "changes",
    [{}, {"maintain": "auto"}, {"smooth": 0.5}, {"reconstruction": tfmq_fx.Reconstruction(
        iterations=3, temporal_iterations=3, tune_iterations=0, batch_size=8
    )}],
    ids=["nearest", "auto", "smooth", "learned"],
)  # fmt: skip
def test_quantize_leaves_the_users_buffers_and_starts_from_them(changes):
    network = make(Running)
    network.mean.fill_(0.25)
    q = quantized(network, **changes)
    assert torch.equal(network.mean, torch.full((2, 8), 0.25))
    assert torch.equal(q.network.mean, network.mean)
    q(X, T)
    assert not torch.equal(q.network.mean[0], network.mean[0])


def test_a_function_that_runs_a_network_leaves_its_buffers_even_if_it_fails():
    network = make(Running)

    @keeps_buffers
    def run(network):
        network(X, T)
        assert network.mean.any()
        raise ZeroDivisionError

    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        run(network)
    assert not network.mean.any()


def test_buffers_without_values_are_not_compared():
    with FakeTensorMode():
        network = nn.BatchNorm1d(3)
        assert keeps_buffers(lambda network, x: network(x).shape)(network, torch.zeros(2, 3)) == (2, 3)


def test_compiled_forms_say_that_they_keep_the_buffer(tmp_path):
    q = quantized(make(Running))
    words = "mean: the network updates it at each call, a compiled one keeps its present value"
    assert words in q.export(tmp_path / "q.onnx").notes
    assert words not in q.export(tmp_path / "q.pt2").notes
    assert lower(q, engine="openvino", batch=2).report["lowering"]["notes"] == [words]
    low = lower(q, engine="torch", compile=False, precision="float32", batch=2)
    assert "notes" not in low.report["lowering"]
    first = low(X, T).clone()
    assert not torch.equal(low(X, T), first)
    for refused in (lambda: q.export(tmp_path / "s.onnx", strict=True), lambda: q.lower(strict=True)):
        with pytest.raises(TFMQError, match=f"strict: {words}"):
            refused()
    assert not (tmp_path / "s.onnx").exists()


def test_lowering_is_no_call_of_the_network():
    q = quantized(make(Running))
    before = written_buffers(q.network)["mean"].clone()
    low = lower(q, engine="torch", compile=False, precision="float32", batch=2)
    for gm in (q.network, low.network.gm):
        assert [torch.equal(x, before) for x in written_buffers(gm).values()] == [True]


def test_the_pt2_file_and_a_loaded_network_go_on_updating(tmp_path):
    q = quantized(make(Running))
    q.export(tmp_path / "q.pt2")
    q.save_pretrained(tmp_path / "q")
    program = torch.export.load(tmp_path / "q.pt2").module()
    loaded = tfmq_fx.load(tmp_path / "q")
    with torch.no_grad():
        for _ in range(3):
            expected = q(X, T)
            assert torch.equal(program(sample=X, timestep=T), expected)
            assert torch.equal(loaded(X, T), expected)


def test_tuning_all_blocks_together_is_refused():
    settings = tfmq_fx.Reconstruction(iterations=1, temporal_iterations=1, tune_iterations=2)
    with pytest.raises(TFMQError, match=r"the network updates mean at each call, .*tune_iterations=0"):
        quantized(make(Running), reconstruction=settings)


def test_a_write_to_a_cast_copy_is_none():
    class Casts(Running):
        def forward(self, sample, timestep):
            table = self.fixed.to(torch.float64)
            table.mul_(2)
            return self.outer(
                self.inner(sample) + table.float() + self.time(timestep.float()[:, None])[:, None]
            )

    assert not written_buffers(tfmq_fx.capture(make(Casts), {"sample": X, "timestep": T}))
