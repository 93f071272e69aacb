"""A network that squeezes its timestep without naming a dimension, as smalldiffusion's transformer does, takes any number of rows."""

import functools

import pytest
import torch
from torch import nn

import tfmq_fx
from tests.helpers.agreement import assert_same_but_for_flips
from tests.helpers.exported import session

SIZES = (1, 2, 3)
SIGMAS = torch.linspace(0.1, 2, 8).repeat(8)
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Squeezing(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.a, self.b = nn.Linear(2, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, sigma):
        s = sigma.reshape(-1, 1, 1).squeeze()
        if s.dim() == 0:
            s = s[None].repeat(len(x))
        s = s.log()[:, None]
        h = self.a(x) + self.time(torch.cat([s.sin(), s.cos()], 1))
        return self.b(torch.relu(h.squeeze(1)))  # of 16, which stay


@functools.cache
def quantized():
    """By the preset's name, which measures what each row's rounding does, one row at a time."""
    torch.manual_seed(0)
    network = Squeezing().eval()
    data = tfmq_fx.CalibrationSet.from_tensors({"x": X, "sigma": SIGMAS}, timestep="sigma")
    return network, tfmq_fx.quantize(network, "w8a8", calibration=data, timestep="sigma", seed=0)


@torch.no_grad()
def test_rows_together_are_those_alone():
    network, q = quantized()
    alone = torch.cat([q(X[i : i + 1], SIGMAS[i : i + 1]) for i in range(max(SIZES))])
    assert_same_but_for_flips([(q(X[:rows], SIGMAS[:rows]), alone[:rows]) for rows in SIZES])
    expected = torch.cat([network(X[i : i + 1], SIGMAS[i : i + 1]) for i in range(max(SIZES))])
    assert (alone - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    _, q = quantized()
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    for rows in SIZES:
        assert torch.equal(loaded(X[:rows], SIGMAS[:rows]), q(X[:rows], SIGMAS[:rows]))


def of_pt2(file):
    program = torch.export.load(file).module()
    return lambda x, sigma: program(x=x, sigma=sigma)


def of_onnx(file):
    loaded = session(file)
    return lambda x, sigma: torch.from_numpy(loaded.run(None, {"x": x.numpy(), "sigma": sigma.numpy()})[0])


def of_openvino(folder):
    import openvino

    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(folder / "network.xml", "CPU", hint)
    return lambda x, sigma: torch.from_numpy(model({"x": x.numpy(), "sigma": sigma.numpy()})[0])


EXPORTS = {
    "pt2": ("net.pt2", of_pt2, "torch"),
    "onnx": ("net.onnx", of_onnx, "onnxruntime"),
    "onnxruntime": ("net.onnx", of_onnx, "onnxruntime"),
    "openvino": ("net", of_openvino, "openvino"),
}


@pytest.mark.parametrize("form", EXPORTS)
@torch.no_grad()
def test_exported(tmp_path, form):
    name, loader, package = EXPORTS[form]
    pytest.importorskip(package)
    _, q = quantized()
    q.export(tmp_path / name, format=form)
    run = loader(tmp_path / name)
    assert_same_but_for_flips([(run(X[:rows], SIGMAS[:rows]), q(X[:rows], SIGMAS[:rows])) for rows in SIZES])
