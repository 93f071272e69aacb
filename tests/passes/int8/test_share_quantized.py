"""One tensor is quantized once, whoever reads it."""

from collections import Counter

import torch
from torch import nn

from benchmarks.networks.small import TinyUNet
from tests.helpers.lowered import BYTES, SIZES, assert_same_but_for_ties, lower, mixed, noise
from tests.helpers.nearest import quantized
from tfmq_fx.passes.int8.kernels import KERNELS
from tfmq_fx.runtimes import torch_engine


class Neighbours(nn.Module):
    """Two layers with nothing between them, and two that read the same tensor."""

    def __init__(self):
        super().__init__()
        self.unet = TinyUNet()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, sample, timestep):
        h = torch.sin(self.a(self.unet(sample, timestep)))
        return self.out(torch.sin(self.c(self.b(h)) + self.b(h) * 0.5))


@torch.no_grad()
def test_nothing_is_quantized_twice_and_neighbours_hand_over_bytes():
    q = quantized("w4a8", network_class=Neighbours)
    low = lower(q, engine="torch", precision="float32", compile=False)
    assert_same_but_for_ties([(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in SIZES])
    if not BYTES:
        return
    gm = low.network.gm
    dtypes = [
        torch_engine.dtypes_of(gm, {"sample": noise(1), "timestep": mixed(1)})[n]
        for n in gm.graph.nodes
        if n.target in KERNELS
    ]
    assert torch.uint8 in dtypes
    read = Counter(n.args for n in gm.graph.nodes if n.target is torch_engine.quantize)
    assert max(read.values()) == 1
