"""Linears of rows have a dimension more: the same values, and nothing else is touched."""

from collections import Counter

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, calibration
from tests.helpers.int8_passes import operators
from tests.helpers.nearest import quantized, recipe
from tfmq_fx.artefact.program import flat_graph
from tfmq_fx.base.metrics import first_tensor
from tfmq_fx.graph.nodes import meta_value, op_name
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.int8.unsqueeze_linears import unsqueeze_linears
from tfmq_fx.passes.pass_manager import PassManager

DATA = calibration()
INPUTS = (DATA.tensors["sample"], DATA.tensors["timestep"])


class Rows(nn.Module):
    """A network of vectors, whose first layer reads the input itself."""

    def __init__(self):
        super().__init__()
        self.first, self.time, self.last = nn.Linear(6, 8), nn.Linear(1, 8), nn.Linear(8, 6)

    def forward(self, sample, timestep):
        return self.last(torch.tanh(self.first(sample) + self.time(timestep[:, None].float() / 1000)))


@pytest.mark.parametrize("keyed", ["block", "all"])
@torch.no_grad()
def test_linears_of_rows_have_a_dimension_more(keyed):
    gm = flat_graph(quantized("w8a8", keyed))
    PassManager(TO_INT8)(gm)
    before, expected = operators(gm), first_tensor(gm(*INPUTS))
    rows = [n for n in gm.graph.nodes if op_name(n) == "linear" and meta_value(n).dim() == 2]
    inputs = {n.args[0] for n in rows}
    assert rows
    assert unsqueeze_linears(gm).modified
    added = Counter(operators(gm)) - Counter(before)
    assert added["unsqueeze"] == len(inputs)
    assert added["squeeze"] == len(rows)
    assert set(added) <= {"unsqueeze", "squeeze", "quantize_per_tensor", "dequantize_per_tensor"}
    for node in rows:
        assert meta_value(node).dim() == meta_value(node.args[0]).dim() == 3
    torch.testing.assert_close(first_tensor(gm(*INPUTS)), expected)  # a kernel may add in another order
    assert not unsqueeze_linears(gm).modified


def test_inputs_of_the_network_stay_first():
    torch.manual_seed(0)
    rows = {"sample": torch.randn(20, 6), "timestep": TIMESTEPS.repeat(2)}
    q = tfmq_fx.quantize(Rows().eval(), recipe("w8a8"), calibration=tfmq_fx.CalibrationSet.from_tensors(rows))
    gm = flat_graph(q)
    PassManager(TO_INT8)(gm)
    unsqueeze_linears(gm)
    kinds = [n.op == "placeholder" for n in gm.graph.nodes if n.op in ("placeholder", "call_function")]
    assert kinds == sorted(kinds, reverse=True)
    lowered = q.lower("cpu", engine="openvino", precision="float32")
    with torch.no_grad():
        torch.testing.assert_close(lowered(**rows), q(**rows), rtol=1e-4, atol=1e-5)
