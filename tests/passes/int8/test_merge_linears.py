"""Linears that read the same bytes, in one product."""

import pytest
import torch
from torch import nn

from tests.helpers.int8_passes import Weighted, exported_batch, operators, pair
from tfmq_fx.passes import cuda_kernels, fuse_epilogues, merge_linears, share_quantized
from tfmq_fx.passes.int8 import merge_linears as module
from tfmq_fx.passes.int8.kernels import GPU_KERNELS, LAYER, arguments_of


class Attention(nn.Module):
    """q, k and v of one x, the last of which has a bias; and a linear of another input, and one that adds a tensor."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (Weighted(nn.Linear(8, n, bias=False)) for n in (8, 16, 24))
        self.b = nn.Parameter(torch.randn(24), requires_grad=False)
        self.other, self.added = (Weighted(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, *inputs):
        x, y, s = inputs
        qx = pair(x)
        q, k, v = (layer(qx) * s for layer in (self.q, self.k, self.v))
        heads = (v + self.b).view(v.shape[0], -1, 4, 6).transpose(1, 2)
        return q, k, heads, self.other(pair(y)) * s, self.added(qx) + y


@pytest.fixture
def gm():
    torch.manual_seed(0)
    gm = exported_batch(Attention(), torch.rand(2, 3, 8), torch.rand(2, 3, 8), torch.rand(2, 3, 1))
    for run in (cuda_kernels, fuse_epilogues, share_quantized):
        run(gm)
    return gm


def kernels(gm):
    return [n for n in gm.graph.nodes if n.target in GPU_KERNELS]


@torch.no_grad()
def test_layers_of_the_same_bytes_are_one_product_with_the_same_bits(gm):
    inputs = [torch.rand(2, 3, 8), torch.rand(2, 3, 8), torch.rand(2, 3, 1)]
    expected, names = gm(*inputs), sorted(n.meta[LAYER][0] for n in kernels(gm))
    assert merge_linears(gm).modified
    merged = [n for n in kernels(gm) if len(n.meta[LAYER]) > 1]
    assert [len(gm.get_buffer(arguments_of(n)["weight"].target)) for n in merged] == [8 + 16 + 24]
    assert sorted(name for n in kernels(gm) for name in n.meta[LAYER]) == names
    assert len(kernels(gm)) == 3  # the other input's and the one that adds a tensor stay apart
    torch.testing.assert_close(gm(*inputs), expected, rtol=0, atol=0)
    assert operators(gm).count("split_with_sizes") == 1
    assert not merge_linears(gm).modified
    merged_values = gm(*[x.repeat(2, *[1] * (x.dim() - 1)) for x in inputs])
    assert merged_values[0].shape == (4, 3, 8)  # the batch stays open


@torch.no_grad()
def test_a_product_has_a_limited_width(gm, monkeypatch):
    monkeypatch.setattr(module, "COLUMNS", 30)
    merge_linears(gm)
    assert [len(n.meta[LAYER]) for n in kernels(gm)] == [2, 1, 1, 1]
