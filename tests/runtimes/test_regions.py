"""What lies between kernels, compiled once for each kind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.int8_passes import Weighted, exported_batch, pair
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.passes import cuda_kernels, fuse_epilogues, share_quantized
from tfmq_fx.runtimes.regions import compile_regions


class Blocks(nn.Module):
    """Equal blocks of two linears with a norm and a gate between them, whose scales differ; a convolution; and a skip."""

    def __init__(self, blocks=3):
        super().__init__()
        self.first = nn.ModuleList(Weighted(nn.Linear(8, 32)) for _ in range(blocks))
        self.second = nn.ModuleList(Weighted(nn.Linear(16, 8)) for _ in range(blocks))
        self.norm, self.conv = nn.LayerNorm(8), Weighted(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, *inputs):
        (x,) = inputs
        skip = x
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            a, b = first(pair(self.norm(x), 0.03 + i / 100, 120 + i)).chunk(2, dim=-1)
            x = x + second(pair(a * F.gelu(b), 0.05 + i / 100, 110 + i))
        picture = (x + skip).transpose(1, 2).reshape(x.shape[0], 8, 2, 2)
        return self.conv(pair(torch.tanh(picture) * 2.0, 0.02, 100)), x.shape[0]


@pytest.fixture
def gm():
    torch.manual_seed(0)
    gm = exported_batch(Blocks(), torch.rand(2, 4, 8))
    for run in (cuda_kernels, fuse_epilogues, share_quantized):
        run(gm)
    return gm


class Compiler:
    """A compiler that keeps what it was given and computes it as it is."""

    def __init__(self):
        self.parts = []

    def __call__(self, part, examples):
        self.parts.append(part)
        part(*examples)  # examples have the right forms
        return part


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_values_stay_and_equal_regions_are_compiled_once(gm, size):
    x, compiler = torch.rand(size, 4, 8), Compiler()
    expected = gm(x)
    made = compile_regions(fresh(gm), [x], compiler)
    got = made(x)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    assert got[1] == expected[1]
    regions = [n for n in made.graph.nodes if n.op == "call_module"]
    assert len(regions) == 3 + 3 + 1  # a norm and a gate for each block, and what is before the convolution
    assert len(compiler.parts) == 1 + 1 + 1  # the blocks' scales and zero points are data
    other = torch.rand(size, 4, 8)
    torch.testing.assert_close(made(other)[0], gm(other)[0], rtol=0, atol=0)


@torch.no_grad()
def test_bytes_of_a_picture_are_padded_and_laid_out_before_the_kernel(gm):
    x = torch.rand(2, 4, 8)
    made = compile_regions(fresh(gm), [x], Compiler())
    (kernel,) = made.graph.find_nodes(op="call_function", target=torch.ops.tfmq.int8_conv2d.default)
    seen = {}

    class Run(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n] = super().run_node(n)
            return seen[n]

    Run(made).run(x)
    picture = seen[kernel.args[0]]
    assert picture.shape == (2, 8, 4, 4)
    assert picture.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_what_a_compiler_raises_is_raised(gm):
    def fails(*_):
        raise ValueError("out of registers")

    with pytest.raises(ValueError, match="out of registers"):
        compile_regions(fresh(gm), [torch.rand(2, 4, 8)], fails)
