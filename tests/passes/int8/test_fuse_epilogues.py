"""What follows a kernel, in the kernel."""
# ruff: noqa: ARG005

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.agreement import CLOSE, moved
from tests.helpers.int8_passes import Weighted, exported_batch, operators, pair
from tfmq_fx.passes import cuda_kernels, fuse_epilogues, share_quantized
from tfmq_fx.passes.int8.kernels import GPU_KERNELS, arguments_of
from tfmq_fx.passes.int8.rescale_temporal import PRECISE


class After(nn.Module):
    """A layer of quantized x, and what follows: `then(y, *others)`."""

    def __init__(self, layer, then):
        super().__init__()
        self.layer, self.then = Weighted(layer), then
        self.b = nn.Parameter(torch.randn(layer.weight.shape[0]), requires_grad=False)

    def forward(self, *x):
        return self.then(self.layer(pair(x[0])), self.b, *x[1:])


CONV, LINEAR = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Linear(4, 6, bias=False)
PICTURE, ROWS, TOKEN = (2, 4, 5, 5), (2, 3, 4), (2, 3, 1)
Q, RESHAPES = "quantize_per_tensor", ("unsqueeze", "slice", "_assert_tensor_metadata")
CASES = {
    "resnet": (CONV, PICTURE, [(2, 1, 1, 1), (2, 6, 1, 1)], lambda y, b, s, r: y * s + b[:, None, None] + r,
               ["row_scale", "bias", "residual"], []),
    "late residual": (CONV, PICTURE, [(2, 6, 5, 5)], lambda y, b, r: y + torch.sin(r), ["residual"], ["sin"]),
    "mlp to bytes": (LINEAR, ROWS, [TOKEN], lambda y, b, s: pair(F.gelu(y + b, approximate="tanh") * s, 0.02),
                     ["bias", "y_factor", "gelu_tanh", "int8"], ["dequantize_per_tensor"]),
    "tokens": (LINEAR, ROWS, [TOKEN], lambda y, b, s: F.silu(s * y + b), ["row_scale", "bias", "silu"], []),
    "gelu": (LINEAR, ROWS, [], lambda y, b: F.gelu(y), ["gelu"], []),
    "one number": (LINEAR, ROWS, [], lambda y, b: y * b[:1] + b, ["bias", "row_scale"], []),
    # What must stay.
    "by channel": (LINEAR, ROWS, [], lambda y, b: y * b, [], ["mul"]),
    "by pixel": (CONV, PICTURE, [(2, 1, 5, 5)], lambda y, b, s: y * s, [], ["mul"]),
    "wider": (LINEAR, ROWS, [(2, 2, 3, 6)], lambda y, b, r: y[:, None] + r, [], ["add"]),
    "broadcast": (LINEAR, (2, 4), [(2, 2, 6)], lambda y, b, r: y + r, [], ["add"]),
    "read twice": (LINEAR, ROWS, [], lambda y, b: (y + b) * y, [], ["add", "mul"]),
    "alpha": (LINEAR, ROWS, [], lambda y, b: torch.add(y, b, alpha=2), [], ["add"]),
    "after silu": (LINEAR, ROWS, [TOKEN], lambda y, b, s: F.silu(y) * s + b, ["silu"], ["mul", "add"]),
    "twice": (LINEAR, ROWS, [(2, 3, 6), (2, 3, 6)], lambda y, b, r, s: y + r + s, ["residual"], ["add"]),
    "integers": (LINEAR, ROWS, [], lambda y, b: y + b.long(), [], ["to", "add"]),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_what_follows_is_fused_if_the_kernel_can_compute_it(name):
    layer, shape, others, then, fused, left = CASES[name]
    torch.manual_seed(0)
    gm = exported_batch(After(layer, then), *(torch.rand(s) for s in (shape, *others)))
    cuda_kernels(gm)
    assert fuse_epilogues(gm).modified == bool(fused)
    share_quantized(gm)
    kernel_name = "int8_conv2d" if layer is CONV else "int8_linear"
    assert [n for n in operators(gm) if n not in (Q, kernel_name, *RESHAPES)] == left
    (kernel,) = [n for n in gm.graph.nodes if n.target in GPU_KERNELS]
    done = arguments_of(kernel)
    words = {k for k in ("row_scale", "bias", "residual", "y_factor") if done[k] is not None}
    words |= {done["activation"]} - {"none"} | ({"int8"} if done["dtype"] is torch.int8 else set())
    assert words == set(fused)
    assert not fuse_epilogues(gm).modified
    for n in (1, 3) if name != "broadcast" else (2,):  # there the batch is a fixed size
        inputs = [torch.rand(n, *s[1:]) * 4 for s in (shape, *others)]
        plain = exported_batch(After(layer, then), *(torch.rand(s) for s in (shape, *others)))
        for key, value in plain.state_dict().items():
            if key.rpartition(".")[2] == "b":
                value.copy_(gm.state_dict()[key])
        assert moved(gm(*inputs), plain(*inputs))[1] <= (CLOSE if "int8" not in fused else 0.01)


@torch.no_grad()
def test_what_cancels_keeps_its_own_output():
    gm = exported_batch(After(LINEAR, lambda y, b: y + b), torch.rand(ROWS))
    cuda_kernels(gm)
    (kernel,) = [n for n in gm.graph.nodes if n.target in GPU_KERNELS]
    kernel.meta[PRECISE] = True
    assert not fuse_epilogues(gm).modified
