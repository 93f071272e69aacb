"""What the tests of every engine share: the quantized networks, their inputs, what this CPU has, and how far a lowered
network may be off.
"""

import contextlib
import functools
import tempfile

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, ScalarTime, make, vectors
from tests.helpers.agreement import FLIPPED_BY, FLIPPED_ROWS, moved
from tfmq_fx.base.arithmetic import NO_INT8, SATURATES
from tfmq_fx.runtimes.cpu import adds_pairs, int8_instructions, torch_has_bfloat16

SIZES = (1, 3, 16)
# Every test of every engine: the graph of the low bits, and every layer keyed; 8 bits are the other tests' network.
_slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SETTINGS = [
    ("w4a4", "block"),
    ("w4a8", "all"),
    _slow("w8a8", "block"),
    _slow("w4a8", "block"),
    _slow("w4a16", "block"),
]
# Eight bits of mantissa: each of some ten layers adds half of 2^-8 of its output, and flips activations by a step.
# 2.2% (OpenVINO) and 1.4% (torch) of the largest output were measured on the tiny network.
BFLOAT16 = 0.05
# Values are tested on every CPU; that int8 or bfloat16 kernels run, where there are such.
INT8 = bool(int8_instructions())
BYTES = INT8 or adds_pairs()  # at least for weights of 4 bits
needs_kernels = pytest.mark.skipif(not INT8, reason=NO_INT8)
needs_bytes = pytest.mark.skipif(not BYTES, reason="this CPU has neither int8 instructions nor AVX2")
# x86 without VNNI: int8 kernels for what does not saturate. Any x86 can be taken for one.
needs_avx2 = pytest.mark.skipif(not adds_pairs(), reason="this CPU has no AVX2")
needs_bfloat16 = pytest.mark.skipif(not torch_has_bfloat16(), reason="this CPU does not compute in bfloat16")


def lower(q, *args, **settings):
    """q.lower, and its warning exactly where this CPU has no int8 instructions."""
    with (
        contextlib.nullcontext()
        if INT8
        else pytest.warns(UserWarning, match="this CPU has no int8 instructions")
    ):
        return q.lower(*args, **settings)


def noise(size):
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(size))


def mixed(size):
    return TIMESTEPS[torch.arange(size) * 3 % 10]


def assert_same_but_for_ties(pairs):
    """(got, expected): see tests/helpers/agreement.py. A kernel scales the exact sum of integers once, or adds in another
    order, where the float layer rounds every product: an activation that near to a rounding tie becomes the next integer."""
    masks, worst = zip(*(moved(got, expected) for got, expected in pairs), strict=True)
    assert torch.cat(masks).float().mean() <= FLIPPED_ROWS
    assert max(worst) <= FLIPPED_BY


@torch.no_grad()
def assert_every_batch_size_and_step_agrees(low, q):
    pairs = [(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in SIZES]
    pairs += [(low(noise(3), t), q(noise(3), t)) for t in TIMESTEPS]
    assert_same_but_for_ties(pairs)
    for (one, _), (other, _) in zip(pairs[len(SIZES) :], pairs[len(SIZES) + 1 :], strict=False):
        assert moved(one, other)[0].all()  # the control: the step shows


def assert_int8_where_pairs_fit(q, low):
    """On x86 without VNNI: 4-bit weights on int8 kernels, 8-bit ones in float, and said."""
    kernels = {k["path"]: k for k in low.report["lowering"]["kernels"]}
    assert low.report["lowering"]["instructions"] == ["avx2"]
    of_bytes = [layer for layer in q.report["layers"] if layer["activation_bits"] == 8]
    assert {layer["weight_bits"] for layer in of_bytes} == {4, 8}
    for layer in of_bytes:
        kernel = kernels[layer["path"]]
        fits = layer["weight_bits"] == 4
        assert (kernel["int8"], kernel["fell_back"]) == (fits, not fits), kernel
        assert (kernel["reason"] == SATURATES) == (not fits)


@functools.cache
def kept():
    """A folder, so that each network is converted once."""
    return tempfile.mkdtemp(prefix="tfmq-tests-")


def linear_alone(bits, network=None):
    nearest = tfmq_fx.Reconstruction(method="nearest")
    recipe = tfmq_fx.Recipe(
        weight_bits=bits, edge_weight_bits=bits, edge_activation_bits=8, reconstruction=nearest
    )
    return tfmq_fx.quantize(network or make(ScalarTime), recipe, calibration=vectors())


def kernels_of(low):
    return {k["path"]: k for k in low.report["lowering"]["kernels"]}
