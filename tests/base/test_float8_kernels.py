"""float8 linears for GPUs: the reference against float64, what a GPU would be asked, and a GPU's own where there is one."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode

from tfmq_fx.base import float8
from tfmq_fx.base.float8_kernels import LEAST, padded, stored

linear = torch.ops.tfmq.float8_linear
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < LEAST,
    reason="no GPU of compute capability 8.9 or more",
)
SHAPES = [(5, 33, 7), (4, 16, 16), (3, 4, 48, 32), (2, 3, 2, 20, 16)]  # leading dimensions, C_in, C_out


def given(*shape, rows=True, bias=True):
    """Return an operator's arguments but the dtype, and its exact result, in float64, with the padding."""
    *leading, columns, channels = shape
    x, w = (torch.randn(*s).mul(50).to(float8.DTYPE) for s in ((*leading, columns), (channels, columns)))
    weight = stored(w)
    scale = padded(torch.rand(channels), len(weight))
    row_scale = torch.rand(leading[0], *[1] * len(leading)) + 0.1 if rows else None
    b = padded(torch.randn(channels), len(weight)) if bias else None
    y = x.double() @ padded(w, len(weight), columns).double().T * scale.double()
    y = y * (1.0 if row_scale is None else row_scale.double())
    return (x, weight, scale, row_scale, b), y + (0.0 if b is None else b.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "bias"), [(True, True), (False, False)])
def test_the_reference_is_exact_to_the_dtype(shape, rows, bias):
    arguments, exact = given(*shape, rows=rows, bias=bias)
    # Sums are rounded to float32 once, then scaled.
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        y = linear(*arguments, dtype)
        assert y.dtype is dtype
        assert (y.double() - exact).abs().max() <= bound * exact.abs().max()


def test_sizes_are_multiples_of_16_once_stored_and_the_padding_is_zero():
    w = torch.randn(7, 33).to(float8.DTYPE)
    found = stored(w)
    assert (tuple(found.shape), found.dtype, found.is_contiguous()) == ((16, 48), float8.DTYPE, True)
    assert torch.equal(found[:7, :33].float(), w.float())
    assert found.float().abs().sum() == w.float().abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_is_asked_for_scaled_mm_with_scales_that_it_takes(shape, dtype):
    """torch's own checks of _scaled_mm run on fake tensors: layouts, multiples of 16, scales for rows."""
    arguments, exact = given(*shape)
    with FakeTensorMode():
        fakes = [torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in arguments]

        def f(*a):
            return (linear(*a, dtype),)

        (y,) = f(*fakes)
        graph = aot_export_joint_simple(f, tuple(fakes), trace_joint=False).graph
    assert (y.shape, y.dtype, y.device.type) == (exact.shape, dtype, "cuda")
    (product,) = [n for n in graph.nodes if n.target is torch.ops.aten._scaled_mm.default]
    scales = [tuple(n.meta["val"].shape) for n in product.args[2:4]]
    rows = exact.shape[:-1].numel()
    assert scales == ([(), ()] if dtype is torch.float32 else [(rows, 1), (1, exact.shape[-1])])


def test_a_transposed_input_is_laid_out_by_rows():
    with FakeTensorMode():
        x = torch.empty(32, 5, dtype=float8.DTYPE, device="cuda").t()
        weight = torch.empty(16, 32, dtype=float8.DTYPE, device="cuda")
        scale = torch.empty(16, device="cuda")
        assert linear(x, weight, scale, None, None, torch.bfloat16).shape == (5, 16)

        def f(*a):
            return (linear(*a, None, None, torch.bfloat16),)

        graph = aot_export_joint_simple(f, (x, weight, scale), trace_joint=False).graph
    (product,) = [n for n in graph.nodes if n.target is torch.ops.aten._scaled_mm.default]
    assert product.args[0].meta["val"].stride() == (32, 1)


def on_a_gpu(shape, dtype, **settings):
    """Return the largest error of the kernel on this machine's GPU, relative to the largest exact output."""
    arguments, exact = given(*shape, **settings)
    moved = [None if a is None else a.cuda() for a in arguments]
    y = linear(*moved, dtype)
    assert (y.dtype, tuple(y.shape)) == (dtype, tuple(exact.shape))
    return float((y.cpu().double() - exact).abs().max() / exact.abs().max())


@needs_gpu
@pytest.mark.parametrize("shape", [*SHAPES, (77, 640, 1280), (2, 1024, 320, 640), (1, 2048, 32)])
@pytest.mark.parametrize(("rows", "bias"), [(True, True), (False, False)])
def test_a_gpu_computes_the_same(shape, rows, bias):
    # float32: sums of 14 bits before they are promoted; bfloat16: its own rounding, and such sums.
    for dtype, bound in ((torch.float32, 2**-10), (torch.bfloat16, 2**-7)):
        assert on_a_gpu(shape, dtype, rows=rows, bias=bias) <= bound
