"""The graph that cuDNN is given computes what the kernels do: a frontend of our own evaluates it with torch."""

import types

import pytest
import torch
from torch.nn import functional as F

from tfmq_fx.base import cudnn_int8
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.int8_kernels import stored

tfmq = torch.ops.tfmq


class Value:
    """A tensor of a graph: how to compute it from the given tensors."""

    def __init__(self, compute):
        self.compute = compute

    def set_data_type(self, dtype):
        self.dtype = dtype
        return self

    def set_output(self, _):
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    set_stride = set_output


def of_two(operation):
    return lambda _, *, a, b: Value(lambda p: operation(a.compute(p), b.compute(p)))


def of_one(operation):
    return lambda _, x: Value(lambda p: operation(x.compute(p)))


class Graph:
    """cuDNN's graph, by the names of its frontend."""

    def __init__(self, **_):
        self.plans = 1

    def tensor(self, *, name, dim, stride, data_type):  # noqa: ARG002
        value = Value(lambda pack: pack[value].double())
        value.form = (dim, stride, data_type)
        return value

    def conv_fprop(self, *, image, weight, padding, stride, dilation, compute_data_type):
        assert compute_data_type == "INT32"
        return Value(lambda p: F.conv2d(image.compute(p), weight.compute(p), None, stride, padding, dilation))

    add, sub, mul = of_two(torch.add), of_two(torch.sub), of_two(torch.mul)
    swish, gelu = of_one(F.silu), of_one(F.gelu)
    gelu_approx_tanh = of_one(lambda v: F.gelu(v, approximate="tanh"))

    def nothing(self, *_):
        return 0

    validate = build_operation_graph = create_execution_plans = check_support = nothing
    get_workspace_size_plan_at_index = nothing

    def build_plan_at_index(self, plan):
        if plan >= self.plans:
            raise RuntimeError("plan index out of range\nand more")

    def execute_plan_at_index(self, pack, space, plan, *, handle):  # noqa: ARG002
        for value, tensor in pack.items():
            if hasattr(value, "form"):
                assert value.form == (list(tensor.shape), list(tensor.stride()), _NAMES[tensor.dtype])
            else:
                y = value.compute(pack)
                tensor.copy_(y.round().clamp(-128, 127) if tensor.dtype == torch.int8 else y)


_NAMES = {torch.int8: "INT8", torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    kinds = types.SimpleNamespace(**{n: n for n in (*_NAMES.values(), "INT32")})
    module = types.SimpleNamespace(pygraph=Graph, data_type=kinds, heur_mode=types.SimpleNamespace(A="A"))
    monkeypatch.setattr(cudnn_int8, "frontend", lambda: module)
    monkeypatch.setattr(cudnn_int8, "_handle", lambda _: None)
    cudnn_int8._built.cache_clear()
    yield
    cudnn_int8._built.cache_clear()


def given(n, h, w, c, o, taps, *, rows, residual, dtype):
    g = torch.Generator().manual_seed(0)
    integers = lambda *s: torch.randint(-128, 128, s, dtype=torch.int8, generator=g)  # noqa: E731
    x, weight = (
        integers(n, c, h, w).contiguous(memory_format=torch.channels_last),
        stored(integers(o, c, taps, taps)),
    )
    parts = {
        "scale": torch.rand(o, generator=g) / 5000, "correction": integers(o).int() * 50, "bias": torch.randn(o, generator=g),
        "row_scale": torch.rand(n, 1, 1, 1, generator=g) + 0.5 if rows else None,
        "residual": torch.randn(n, o, h, w, generator=g).to(residual) if residual else None,
        "y_factor": torch.rand(n, 1, 1, 1, generator=g) + 0.5 if rows and dtype == torch.int8 else None,
    }  # fmt: skip
    return x, weight, parts


@torch.no_grad()
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("rows", "residual", "dtype"),
    [(False, None, torch.float32), (True, torch.bfloat16, torch.bfloat16), (True, torch.float32, torch.int8)],
)
def test_the_graph_computes_what_the_kernels_do(activation, rows, residual, dtype):
    x, weight, parts = given(2, 5, 3, 16, 8, 3, rows=rows, residual=residual, dtype=dtype)
    settings = {"activation": activation, "y_scale": 0.05, "y_zero_point": -7}
    expected = tfmq.int8_conv2d(
        x, weight, None, *parts.values(), [1, 1], [1, 1], [1, 1], 0, activation, [], 0.05, -7, dtype
    )
    flat = {
        n: None if t is None else t.reshape(-1) for n, t in parts.items() if n in ("row_scale", "y_factor")
    }
    picture = None if parts["residual"] is None else parts["residual"].permute(0, 2, 3, 1)
    y = cudnn_int8.product(
        x.permute(0, 2, 3, 1), weight, **(parts | flat | {"residual": picture}), shape=(2, 5, 3, 8), dtype=dtype,
        stride=(1, 1), padding=(1, 1), dilation=(1, 1), plan=0, **settings,
    )  # fmt: skip
    bound = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    if dtype == torch.int8:
        bound = {"rtol": 0, "atol": 1}  # float32 sums that round to another byte
    torch.testing.assert_close(y.permute(0, 3, 1, 2), expected, **bound)


@torch.no_grad()
def test_scales_by_token_and_a_plan_that_is_not_there():
    x, weight = (
        torch.randint(-128, 128, (2, 1, 3, 16), dtype=torch.int8),
        torch.ones(8, 1, 1, 16, dtype=torch.int8),
    )
    tokens = torch.arange(1.0, 7.0)
    place = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    rest = {
        "correction": None,
        "bias": None,
        "residual": None,
        "y_factor": None,
        "activation": "none",
        "y_scale": 1.0,
        "y_zero_point": 0,
        "shape": (2, 1, 3, 8),
        "dtype": torch.float32,
    }
    y = cudnn_int8.product(x, weight, torch.ones(8), row_scale=tokens, plan=0, **place, **rest)
    torch.testing.assert_close(y[..., 0], x.float().sum(-1) * tokens.reshape(2, 1, 3))
    with pytest.raises(TFMQError, match="cuDNN has no plan 5 for this product: plan index out of range"):
        cudnn_int8.product(x, weight, torch.ones(8), row_scale=tokens, plan=5, **place, **rest)
