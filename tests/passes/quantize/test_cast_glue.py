"""The same integers in another precision: casts where two precisions meet, and nowhere else."""

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import calibration, prepared
from tfmq_fx.artefact.graph_json import quantized_weights, tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import is_decomposed, op_name
from tfmq_fx.passes import cast_glue

BATCH = calibration().tensors
X, T = BATCH["sample"][:4], BATCH["timestep"][:4]
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def converted():
    return tfmq_fx.convert(prepared(keyed="all"))


def run(gm, x):
    with torch.no_grad():
        return gm(x, T)


def dequantizations(gm):
    return [n for m in gm.modules() if hasattr(m, "graph") for n in m.graph.nodes if _dequantizes(n)]


def _dequantizes(node):
    return is_decomposed(node) and op_name(node).startswith("dequantize")


@pytest.mark.parametrize("dtype", HALF)
def test_dequantizations_return_the_new_dtype_and_integers_stay(converted, dtype):
    before = {n: x.clone() for n, x in tensors_of(converted).items()}
    gm = cast_glue(converted, [X.to(dtype), T], before=torch.float32, after=dtype)
    assert {n.kwargs["out_dtype"] for n in dequantizations(gm)} == {dtype}
    after = tensors_of(gm)
    kept = {n for n in before if n.endswith(("_q", "scale", "zero_point", "_table"))}
    assert set(quantized_weights(gm)) < kept
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in kept)
    assert {after[n].dtype for n in before if n.endswith(".bias")} == {dtype}
    assert all(torch.equal(before[n], x) for n, x in tensors_of(converted).items())  # a copy


@pytest.mark.parametrize("dtype", HALF)
def test_values_are_near_those_in_float32(converted, dtype):
    gm = cast_glue(converted, [X.to(dtype), T], before=torch.float32, after=dtype)
    exact, found = run(converted, X), run(gm, X.to(dtype))
    assert found.dtype == dtype
    # Where rounding moves an activation over a tie it takes the next of 256 integers; about ten layers do so.
    assert (found.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_back_in_float32_only_the_float_tensors_are_rounded(converted, dtype):
    half = cast_glue(converted, [X.to(dtype), T], before=torch.float32, after=dtype)
    back = cast_glue(half, [X, T], before=dtype, after=torch.float32)
    assert not any(n.kwargs for n in dequantizations(back))
    rounded = tensors_of(back)
    assert all(
        torch.equal(x, rounded[n]) or torch.equal(x.to(dtype).to(x.dtype), rounded[n])
        for n, x in tensors_of(converted).items()
    )
    again = cast_glue(half, [X.to(dtype), T], before=dtype, after=dtype)
    assert torch.equal(run(again, X.to(dtype)), run(half, X.to(dtype)))


def test_other_dtypes_are_refused(converted):
    with pytest.raises(TFMQError, match=r"from torch\.float32 to torch\.float64"):
        cast_glue(converted, [X, T], before=torch.float32, after=torch.float64)


def test_timesteps_are_embedded_in_float32(converted):
    """In bfloat16 901 would be 900: the sinusoids of neighbours would be the same."""
    gm = cast_glue(converted, [X.bfloat16(), T], before=torch.float32, after=torch.bfloat16)
    block, exact = gm.temporal_block, converted.temporal_block
    t = torch.tensor([900, 901])
    for a, b in zip(block(t), exact(t), strict=True):
        if a.is_floating_point():
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02 * b.abs().max().item())
