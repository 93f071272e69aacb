"""What does nothing is left out."""

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import remove_noops

X, T = torch.randn(3, 1, 4), torch.rand(3)


class Noops(nn.Module):
    """Of its squeezes, one may take the batch, one takes a dimension, and one takes none, whatever the batch is."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, sample, timestep):
        t = timestep.squeeze(0)[:, None]
        return self.dropout(sample).squeeze(-1).squeeze(1) * t


def graph(network):
    batch = {0: torch.export.Dim.AUTO}
    return torch.export.export(
        network, (X, T), dynamic_shapes={"sample": batch, "timestep": batch}, strict=False
    ).module(check_guards=False)


def test_dropout_and_squeezes_of_nothing_are_gone():
    network = Noops().eval()
    gm = graph(network)
    assert remove_noops(gm).modified
    assert [(op_name(n), n.args[1:]) for n in gm.graph.nodes if op_name(n) in ("dropout", "squeeze")] == [
        ("squeeze", (0,)),
        ("squeeze", (1,)),
    ]
    assert torch.equal(gm(X, T), network(X, T))
    before = str(gm.graph)
    assert not remove_noops(gm).modified
    assert str(gm.graph) == before


def test_a_squeeze_without_shape_metadata_stays():
    gm = symbolic_trace(Noops().eval())
    remove_noops(gm)
    assert [op_name(n) for n in gm.graph.nodes].count("squeeze") == 3


def test_dropout_in_train_mode_is_refused():
    gm = graph(Noops().train())
    with pytest.raises(TFMQError, match=r"node dropout: dropout\(p=0.5\) was captured in train mode"):
        remove_noops(gm)
