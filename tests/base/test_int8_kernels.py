"""int8 convolutions and linears for GPUs: the Triton kernel in Triton's interpreter, and the reference, against int64 sums."""

import importlib.util
import itertools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from tfmq_fx.base import int8_kernels
from tfmq_fx.base.int8_kernels import LONGEST_SUM, TILES, fitted, stored, stored_packed, tile_for

tfmq = torch.ops.tfmq
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
TILE = (16, 16, 32, 4, 2)


def interpreted():
    """Return what makes a kernel run in Triton's interpreter, whatever TRITON_INTERPRET was when Triton was imported."""
    from triton.runtime.interpreter import InterpretedFunction

    return lambda kernel: InterpretedFunction(kernel.fn)


@pytest.fixture
def in_interpreter(monkeypatch):
    """Let the operators run the Triton kernel on CPU tensors."""
    triton = pytest.importorskip("triton")
    numpy = pytest.importorskip("numpy")
    if triton.__version__ < "3.7" and numpy.__version__ >= "2.4":
        pytest.skip("this Triton's interpreter needs an older numpy")
    from tfmq_fx.base import triton_int8

    def launched(x, weight, *rest):
        *parts, dtype, stride, padding, dilation, activation, y_scale, y_zero_point = rest
        sizes = zip(x.shape[1:3], weight.shape[1:3], stride, padding, dilation, strict=True)
        place = [(size + 2 * p - d * (taps - 1) - 1) // s + 1 for size, taps, s, p, d in sizes]
        y = torch.empty(x.shape[0], *place, weight.shape[0], dtype=dtype)
        triton_int8.launch(
            x.contiguous(), weight, *parts, y,
            stride=stride, padding=padding, dilation=dilation, activation=activation, tile=TILE,
            y_scale=y_scale, y_zero_point=y_zero_point, wrap=interpreted(),
        )  # fmt: skip
        return y

    monkeypatch.setattr(int8_kernels, "_reference", launched)


def integers(*shape, low=-128, high=128):
    return torch.randint(low, high, shape, dtype=torch.int8)


def sums(x, w, zero, stride, padding, dilation):
    """The sums of (x - zero) * w in int64, one output pixel after the other."""
    x = F.pad(x.long() - zero, (padding[1], padding[1], padding[0], padding[0]))
    taps_h, taps_w = w.shape[2:]
    out_h, out_w = (
        (x.shape[2 + i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    y = torch.zeros(x.shape[0], w.shape[0], out_h, out_w, dtype=torch.int64)
    for h, c in itertools.product(range(taps_h), range(taps_w)):
        seen = x[:, :, h * dilation[0] :, c * dilation[1] :]
        seen = seen[:, :, :: stride[0], :: stride[1]][:, :, :out_h, :out_w]
        y += torch.einsum("nchw,oc->nohw", seen, w.long()[:, :, h, c])
    return y


def correction_of(w, zero):
    return None if not zero else (zero * w.flatten(1).long().sum(1)).int()


def conv(x, w, *, zero=0, stride=(1, 1), padding=(0, 0), dilation=(1, 1), packed=None, **more):
    """The operator, with scale 1 and float32 outputs unless `more` says otherwise. packed: zero points of 4-bit weights."""
    weight = stored(w) if packed is None else stored_packed(w)
    signed = w if packed is None else w - packed[:, None, None, None]
    given_ = {
        "scale": torch.ones(len(w)),
        "bias": None,
        "row_scale": None,
        "residual": None,
        "y_factor": None,
    }
    given_ |= {"activation": "none", "y_scale": 1.0, "y_zero_point": 0, "dtype": torch.float32} | more
    g = given_
    return tfmq.int8_conv2d(
        x, weight, packed, g["scale"], correction_of(signed, zero), g["bias"], g["row_scale"], g["residual"], g["y_factor"],
        stride, padding, dilation, zero, g["activation"], [], g["y_scale"], g["y_zero_point"], g["dtype"],
    )  # fmt: skip


CASES = [
    {},
    {"padding": (1, 1), "zero": -7},
    {"padding": (2, 1), "stride": (2, 1), "dilation": (2, 1), "zero": 100},
    {"stride": (2, 2), "padding": (1, 1)},
]


def assert_exact(batch, channels, outputs, taps, place, packed):
    x = integers(batch, channels, 6, 5)
    if packed:
        w, zeros = integers(outputs, channels, *taps, low=0, high=16), integers(outputs, low=-3, high=18)
        got = conv(x, w, packed=zeros, **place)
        w = w - zeros[:, None, None, None]
    else:
        w = integers(outputs, channels, *taps)
        got = conv(x, w, **place)
    rest = {"zero": 0, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | place
    expected = sums(x, w, **rest)
    assert expected.abs().max() < 2**24  # float32 holds them
    assert torch.equal(got, expected.float())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", CASES)
def test_reference_is_exact(place, packed):
    assert_exact(3, 19, 5, (3, 3), place, packed)


@pytest.mark.usefixtures("in_interpreter")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", CASES)
def test_kernel_is_exact(place, packed):
    assert_exact(1, 19, 5, (3, 2), place, packed)


@pytest.mark.usefixtures("in_interpreter")
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(
    batch=st.sampled_from([1, 3]),
    channels=st.integers(1, 70),
    outputs=st.integers(1, 20),
    taps=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    zero=st.sampled_from([0, -128, 5, 127]),
    packed=st.booleans(),
)
def test_kernel_is_exact_for_any_shape(batch, channels, outputs, taps, packed, **place):
    assert_exact(batch, channels, outputs, taps, place, packed)


EPILOGUES = [
    {"activation": "silu"},
    {"activation": "gelu", "residual": (2, 6, 1, 1), "row_scale": (2, 1, 1, 1)},
    {"activation": "gelu_tanh", "residual": (2, 6, 4, 3), "dtype": torch.bfloat16},
    {"activation": "silu", "bytes": True, "y_factor": (2, 1, 1, 1), "row_scale": (1,)},
    {"bytes": True, "residual": (2, 6, 4, 3), "dtype": torch.float16},
]


# As on a GPU, exp may be infinite, whose reciprocal is 0; numpy says so.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.usefixtures("in_interpreter")
@pytest.mark.parametrize("which", range(len(EPILOGUES)))
def test_kernel_and_torch_agree_on_what_follows(which):
    case = dict(EPILOGUES[which])
    to_bytes, dtype = case.pop("bytes", False), case.pop("dtype", torch.float32)
    x, w = integers(2, 16, 4, 3), integers(6, 16, 1, 1)
    more = {"scale": torch.rand(6) / 4000, "bias": torch.randn(6).to(dtype)}
    for name in ("residual", "row_scale", "y_factor"):
        if name in case:
            value = torch.rand(case[name]) + 0.5
            # channels last, which is where a kernel's output comes from
            more[name] = value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
    activation = case.get("activation", "none")
    y = sums(x, w, 9, (1, 1), (0, 0), (1, 1)).double() * more["scale"].double()[:, None, None]
    y = y * more.get("row_scale", torch.ones(1)).reshape(-1, 1, 1, 1) + more["bias"].double()[:, None, None]
    y = y + more.get("residual", torch.zeros(1))
    gelu = {"gelu": "none", "gelu_tanh": "tanh"}
    y = F.silu(y) if activation == "silu" else y
    y = F.gelu(y, approximate=gelu[activation]) if activation in gelu else y
    y = y * more.get("y_factor", torch.ones(1))
    more |= {"activation": activation, "dtype": dtype}
    if to_bytes:
        got = conv(x, w, zero=9, **{**more, "dtype": torch.int8, "y_scale": 0.02, "y_zero_point": -100})
        exact = (y / 0.02).clamp(-28, 227)
        assert got.dtype is torch.int8
        # Each is the nearest integer, but for float32's rounding before: 1e-4 of a step.
        assert (got.double() + 100 - exact).abs().max() <= 0.5001
        assert len(got.unique()) > 20
    else:
        got = conv(x, w, zero=9, **more)
        bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]  # the interpreter cuts bits off
        assert got.dtype is dtype
        assert (got.double() - y).abs().max() <= bound * y.abs().max()
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("in_interpreter")
def test_a_value_beyond_all_bytes_saturates_and_ties_go_to_even():
    x, w = torch.full((1, 16, 1, 1), 127, dtype=torch.int8), torch.ones(3, 16, 1, 1, dtype=torch.int8)
    scale = torch.tensor([1e9, -1e9, 2.5 / (127 * 16)])
    y = conv(x, w, scale=scale, dtype=torch.int8, y_zero_point=3)
    assert y.flatten().tolist() == [127, -128, 5]


@pytest.mark.usefixtures("in_interpreter")
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2), (2, 1, 3, 2)])
def test_linears_of_any_rank(shape):
    x, w = integers(*shape, 33), integers(7, 33)
    rows, residual = torch.rand(*shape, 1), torch.randn(*shape[:-1], 1, 7)
    given_ = (rows, residual, None, "none", [], 1.0, 0, torch.float32)
    y = tfmq.int8_linear(x, stored(w), None, torch.ones(7), correction_of(w, 4), torch.ones(7), *given_)
    expected = (x.long() - 4) @ w.long().T
    assert torch.allclose(y, expected * rows + 1 + residual, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 19, 5, 6), (1, 32, 6, 7)])
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(shape):
    w = stored(integers(5, shape[1], 3, 3))
    rest = (None, torch.ones(5), None, None, None, None, None)
    place = ([2, 1], [1, 0], [1, 2], 3, "none", [], 1.0, 0, torch.bfloat16)
    real = tfmq.int8_conv2d(integers(*shape), w, *rest, *place)
    with FakeTensorMode():
        fakes = [
            torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (integers(*shape), w, torch.ones(5))
        ]
        fake = tfmq.int8_conv2d(*fakes[:2], None, fakes[2], *rest[2:], *place)
        linear = tfmq.int8_linear(
            torch.empty(2, 3, 16, dtype=torch.int8, device="cuda"), fakes[1][:, 0, 0], None, fakes[2],
            None, None, None, None, None, "none", [], 1.0, 0, torch.int8,
        )  # fmt: skip
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.device.type == "cuda"
    assert (linear.shape, linear.dtype) == ((2, 3, 5), torch.int8)


class Hopper:
    """Stands for the driver of a GPU of compute capability 9.0, as far as compiling asks for it."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper():
    driver = pytest.importorskip("triton").runtime.driver
    before = vars(driver).copy()
    driver.set_active(Hopper())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # Triton 3.9's own
        yield
    vars(driver).clear()
    vars(driver).update(before)


@pytest.mark.usefixtures("hopper")
def test_compilers_see_the_kernel_and_that_it_writes_its_output_alone():
    w = stored(integers(5, 19, 3, 3))
    with FakeTensorMode():
        x, w, scale = (
            torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for t in (integers(2, 19, 4, 4), w, torch.ones(5))
        )
        rest = ([1, 1], [1, 1], [1, 1], 3, "silu", [], 1.0, 0, torch.bfloat16)

        def f(x, w, scale):
            return (tfmq.int8_conv2d(x, w, None, scale, None, None, None, None, None, *rest),)

        # It refuses graphs that write to their inputs.
        graph = aot_export_joint_simple(f, (x, w, scale), trace_joint=False).graph
    names = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert names.count("triton_kernel_wrapper_functional") == 1
    assert not any("int8_conv2d" in name for name in names)


@needs_triton
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernel_compiles_for_hopper_to_its_own_instructions(packed, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tfmq_fx.base.triton_int8 import int8_product as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"x": "*i8", "weight": "*u8" if packed else "*i8", "weight_zero": "*i8", "correction": "*i32"}
    pointers |= dict.fromkeys(("scale", "bias", "row_scale", "residual", "y_factor"), "*fp32") | {
        "y": "*bf16"
    }
    flags = dict.fromkeys(n for n in kernel.arg_names if n.isupper()) | {
        "TAPS_H": 3,
        "TAPS_W": 3,
        "ACTIVATION": 0,
    }
    flags |= {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "EVEN": True, "PACKED": packed}
    flags = {n: False if v is None else v for n, v in flags.items()}
    floats = dict.fromkeys(("y_inverse", "y_zero_point"), "fp32")
    signature = {
        n: "constexpr" if n in flags else {**pointers, **floats}.get(n, "i32") for n in kernel.arg_names
    }
    aligned = {*pointers, "channels", "columns"}  # by 16: what Triton finds out at a call
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in aligned}
    constants = {(kernel.arg_names.index(n),): v for n, v in flags.items()}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in ptx
    assert "cp.async.cg" in ptx  # 16 bytes of a pixel at a time
    assert "st.global.v4" in ptx
    assert ptx.count("st.global") == ptx.count("st.global.v4")


def test_tiles_by_the_shape():
    assert tile_for(32768, 320, 320) == (128, 128, 64, 8, 4)
    assert tile_for(512, 1280, 1280)[0] == 64
    for rows, columns, channels in itertools.product((1, 100, 10**6), (4, 320), (16, 48, 320, 1280)):
        block_m, block_n, block_k, warps, stages = tile_for(rows, columns, channels)
        assert {block_m, block_n} <= {64, 128}
        assert (block_m + block_n) * block_k * stages <= 200 * 1024  # of Hopper's 227 KiB
        assert warps in (4, 8)
        for memory, packed in itertools.product((99 * 1024, 163 * 1024), (False, True)):
            *_, fewer = fitted((block_m, block_n, block_k, warps, stages), memory=memory, packed=packed)
            assert 1 <= fewer <= stages
            assert (block_m * (1 + packed) + block_n) * block_k * fewer <= memory
    assert tile_for(2048, 1280, 1280, taps=9) == TILES[2]


def test_the_longest_sum_fits():
    assert 255 * 128 * LONGEST_SUM <= 2**31 < 255 * 128 * (LONGEST_SUM + 2)
