"""bfloat16 between int8 kernels, and what keeps float32: what comes from the timestep and from constants alone."""

import math

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, TinyUNet, calibration, make
from tests.helpers.nearest import recipe
from tfmq_fx.artefact.quantized_graph import example_inputs
from tfmq_fx.base.metrics import first_tensor
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import bfloat16_glue
from tfmq_fx.runtimes.torch_engine import dtypes_of, prepare_graph


class Sinusoids(nn.Module):
    """Frequencies that the graph computes, as diffusers' networks do, times timesteps up to 1000."""

    def __init__(self):
        super().__init__()
        self.time, self.mix = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, sample, timestep):
        frequency = torch.exp(-math.log(10000.0) * torch.arange(8, dtype=torch.float32) / 8)
        angle = timestep[:, None].float() * frequency[None]
        return self.mix(sample) + self.time(torch.cat([angle.sin(), angle.cos()], 1))


def data():
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    return tfmq_fx.CalibrationSet.from_tensors({"sample": rows, "timestep": TIMESTEPS.repeat(2)})


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    return tfmq_fx.quantize(Sinusoids().eval(), recipe("w4a8"), calibration=data())


def test_frequencies_keep_float32(quantized):
    gm = prepare_graph(quantized, precision="bfloat16", pack=None).gm
    dtypes = dtypes_of(gm, example_inputs(quantized, batch=1))
    for name in ("arange", "exp", "sin", "cos"):
        found = {dtypes[n] for n in gm.graph.nodes if op_name(n) == name}
        assert found == {torch.float32}, name
    assert torch.bfloat16 in dtypes.values()


def test_features_at_large_timesteps_are_those_of_float32(quantized):
    x = data().tensors["sample"][:4]
    lowered = quantized.lower("cpu", engine="torch", precision="bfloat16", compile=False)
    with torch.no_grad():
        for t in (900, 0):
            y, expected = lowered(x, t), quantized(x, t)
            # 8 bits of the features and of their sum. Frequencies of 8 bits gave 0.3 at 900.
            assert (y - expected).norm() < 0.01 * expected.norm()


def test_values_hold_and_outputs_keep_their_dtype():
    q = tfmq_fx.quantize(make(TinyUNet), tfmq_fx.Recipe(reconstruction=FAST), calibration=calibration())
    gm = prepare_graph(q, precision="float32", pack=None).gm
    inputs = example_inputs(q, batch=2)
    with torch.no_grad():
        expected = first_tensor(gm(*inputs.values()))
        assert bfloat16_glue(gm, dtypes=dtypes_of(gm, inputs), precise=["timestep"]).modified
        found = first_tensor(gm(*inputs.values()))
    assert found.dtype == expected.dtype
    assert (found - expected).norm() < 0.02 * expected.norm()  # about a percent, by the pass's own words
