import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import ScalarTime, TinyUNet, make
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name

X, T = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_graph_equals_the_network_at_any_batch_size(batch):
    network = make(TinyUNet)
    gm = tfmq_fx.capture(network, {"sample": X, "timestep": T})
    x, t = torch.randn(batch, 1, 8, 8), torch.randint(0, 1000, (batch,))
    with torch.no_grad():
        assert torch.equal(gm(x, t), network(x, t))
    assert {id(p) for p in gm.parameters()} <= {id(p) for p in network.parameters()}  # shared, not copied


def test_a_batch_of_one_and_a_scalar_timestep_are_fine():
    network = make(ScalarTime)
    gm = tfmq_fx.capture(network, {"sample": torch.randn(1, 4), "timestep": torch.tensor(7)})
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(gm(x, torch.tensor(400)), network(x, torch.tensor(400)))


class Masked(nn.Module):
    """A mask is repeated for each head, as diffusers' attention does; and tokens along the last dimension."""

    def __init__(self):
        super().__init__()
        self.time, self.out = nn.Linear(1, 4), nn.Linear(8, 4)

    def forward(self, sample, timestep, mask):
        heads = mask.repeat_interleave(2, dim=0).view(sample.shape[0], 2, -1).mean(1)
        x = torch.repeat_interleave(
            sample + self.time(timestep[:, None].float()), 2, -1
        ) + heads.repeat_interleave(2, 1)
        return self.out(x)


def test_what_is_repeated_has_any_batch():
    """torch 2.11 makes a constant of the size that repeat_interleave repeats."""
    network = make(Masked)
    gm = tfmq_fx.capture(network, {"sample": torch.randn(2, 4), "timestep": T, "mask": torch.randn(2, 4)})
    x, t, mask = torch.randn(5, 4), torch.arange(5), torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(gm(x, t, mask), network(x, t, mask))
    assert "repeat_interleave" not in {op_name(n) for n in gm.graph.nodes}


def test_dropout_is_gone():
    gm = tfmq_fx.capture(make(TinyUNet), {"sample": X, "timestep": T})
    assert "dropout" not in {op_name(n) for n in gm.graph.nodes}


def test_train_mode_is_refused():
    network = make(TinyUNet)
    network.down_block.dropout.train()
    with pytest.raises(TFMQError, match=r"down_block\.dropout is in train mode"):
        tfmq_fx.capture(network, {"sample": X, "timestep": T})


def test_a_python_int_timestep_is_refused():
    with pytest.raises(TFMQError, match=r"a Python int \(5\) would be baked"):
        tfmq_fx.capture(make(TinyUNet), {"sample": X, "timestep": 5})


def test_an_unknown_timestep_name_shows_the_nearest():
    with pytest.raises(TFMQError, match="'timesteps': not among the example inputs timestep, sample"):
        tfmq_fx.capture(make(TinyUNet), {"sample": X, "timestep": T}, timestep="timesteps")


def test_nan_in_the_weights_is_refused():
    network = make(TinyUNet)
    with torch.no_grad():
        network.down.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(TFMQError, match=r"weight down\.weight: holds NaN"):
        tfmq_fx.capture(network, {"sample": X, "timestep": T})


def test_data_dependent_control_flow_is_refused_with_exports_words():
    class Branches(nn.Module):
        def forward(self, sample, timestep):
            return sample * 2 if sample.sum() > 0 else sample + timestep

    with pytest.raises(TFMQError, match=r"torch\.export cannot capture Branches: .*[Dd]ata-dependent"):
        tfmq_fx.capture(Branches().eval(), {"sample": torch.randn(2), "timestep": T})


def test_a_batch_size_turned_into_a_number_is_refused():
    class Counts(nn.Module):
        def forward(self, sample, timestep):
            return sample.reshape(len(sample), -1) * timestep[:, None]

    with pytest.raises(
        TFMQError, match="fixed the batch of 'sample' at 2: Counts turns it into a Python number"
    ):
        tfmq_fx.capture(Counts().eval(), {"sample": torch.randn(2, 3), "timestep": T})


def test_the_line_of_the_control_flow_is_shown():
    class Branches(nn.Module):
        def forward(self, sample, timestep):
            if sample.sum() > 0:  # the line
                return sample * 2
            return sample + timestep

    with pytest.raises(TFMQError, match=r"test_capturing\.py:\d+ in forward: if sample\.sum\(\) > 0:"):
        tfmq_fx.capture(Branches().eval(), {"sample": torch.randn(2), "timestep": T}, "timestep")
