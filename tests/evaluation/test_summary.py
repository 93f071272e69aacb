"""What the report says of a quantized network."""

import torch

import tfmq_fx
from benchmarks.networks.small import FAST, TinyUNet, calibration, make


class Tabled(TinyUNet):
    """Has a table that its files hold, and one that they do not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.ones(10, 1, 1))
        self.register_buffer("made", torch.ones(1000), persistent=False)

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) * self.kept[0]


def test_the_float_size_is_that_of_a_file():
    network = make(Tabled)
    q = tfmq_fx.quantize(network, tfmq_fx.Recipe(reconstruction=FAST), calibration=calibration())
    parameters = sum(p.nbytes for p in network.parameters())
    assert q.report["sizes"]["float_bytes"] == parameters + 40
