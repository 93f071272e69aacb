"""Casts to a dtype that is written down."""

import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.nn import functional as F

from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import literal_dtypes


def test_casts_to_another_tensors_dtype_become_literal():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.emb = nn.Linear(1, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            t = self.time(timestep.float()[:, None]).type_as(sample)
            return sample + self.emb(F.silu(t))

    network = Casts().eval()
    x, t = torch.randn(2, 4), torch.tensor([1, 2])
    with torch.no_grad():
        gm = torch.export.export(network, (x, t), strict=False).module()
        assert "type_as" in {op_name(n) for n in gm.graph.nodes}
        expected = gm(x, t)
        assert literal_dtypes(gm).modified
        assert torch.equal(gm(x, t), expected)
    assert "type_as" not in {op_name(n) for n in gm.graph.nodes}
    assert not literal_dtypes(gm).modified
    assert not literal_dtypes(symbolic_trace(network)).modified  # no fake values, nothing known
