"""Helpers of every engine's tests: quantized networks, inputs, features of this CPU, and error bounds."""

import contextlib
import functools
import tempfile

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, Labelled, ScalarTime, make, vectors
from tests.helpers.agreement import FLIPPED_BY, FLIPPED_ROWS, moved
from tfmq_fx.base.arithmetic import NO_INT8, SATURATES
from tfmq_fx.runtimes.cpu import adds_pairs, int8_instructions, torch_has_bfloat16

SIZES = (1, 3, 16)
# For the tests of every engine: a graph of low bits, and one with every layer keyed. Others cover 8 bits.
_slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SETTINGS = [
    ("w4a4", "block"),
    ("w4a8", "all"),
    _slow("w8a8", "block"),
    _slow("w4a8", "block"),
    _slow("w4a16", "block"),
]
# bfloat16 has 8 bits of mantissa: each of about ten layers adds an error of half of 2^-8 of its output, and
# flips activations by a step. On the tiny network, 2.2% (OpenVINO) and 1.4% (torch) of the largest output were
# measured.
BFLOAT16 = 0.05
# Values are tested on every CPU. Whether int8 or bfloat16 kernels run is tested only where the CPU has them.
INT8 = bool(int8_instructions())
BYTES = INT8 or adds_pairs()  # at least for 4-bit weights
needs_kernels = pytest.mark.skipif(not INT8, reason=NO_INT8)
needs_bytes = pytest.mark.skipif(not BYTES, reason="this CPU has neither int8 instructions nor AVX2")
# x86 without VNNI has int8 kernels for weights that do not saturate. Tests can treat any x86 CPU as one.
needs_avx2 = pytest.mark.skipif(not adds_pairs(), reason="this CPU has no AVX2")
needs_bfloat16 = pytest.mark.skipif(not torch_has_bfloat16(), reason="this CPU does not compute in bfloat16")


def lower(q, *args, **settings):
    """Return q.lower(..), and assert that it warns exactly if this CPU has no int8 instructions."""
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
    """Assert that pairs (got, expected) agree but for rounding ties; see tests/helpers/agreement.py.

    A kernel scales the exact sum of integers once, or adds in another order, while the float layer rounds
    every product. An activation that is so close to a rounding tie becomes the next integer.
    """
    masks, worst = zip(*(moved(got, expected) for got, expected in pairs), strict=True)
    assert torch.cat(masks).float().mean() <= FLIPPED_ROWS
    assert max(worst) <= FLIPPED_BY


@torch.no_grad()
def assert_every_batch_size_and_step_agrees(low, q):
    pairs = [(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in SIZES]
    pairs += [(low(noise(3), t), q(noise(3), t)) for t in TIMESTEPS]
    assert_same_but_for_ties(pairs)
    for (one, _), (other, _) in zip(pairs[len(SIZES) :], pairs[len(SIZES) + 1 :], strict=False):
        assert moved(one, other)[0].all()  # control: the output depends on the step


@torch.no_grad()
def assert_guided_batches_agree(low, q):
    """Assert that a guided batch of `Labelled` gives what q gives, and what its two halves give alone."""
    x, y = torch.randn(3, 1, 6, 6), torch.tensor([0, 1, 2])
    null, pairs = torch.full((3,), Labelled.classes - 1), []
    for t in TIMESTEPS[:4]:
        guided = low(torch.cat([x, x]), t, torch.cat([y, null]))
        pairs += [(guided, q(torch.cat([x, x]), t, torch.cat([y, null])))]
        pairs += [(guided, torch.cat([low(x, t, y), low(x, t, null)]))]
        assert moved(guided[:3], guided[3:])[0].all()
    assert_same_but_for_ties(pairs)


def assert_int8_where_pairs_fit(q, low):
    """Assert that x86 without VNNI runs 4-bit weights on int8 kernels and 8-bit ones in float.

    The report must say so.
    """
    kernels = kernels_of(low)
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
    """Return a folder of converted networks, so that each is converted once."""
    return tempfile.mkdtemp(prefix="tfmq-tests-")


def linear_alone(bits, network=None):
    nearest = tfmq_fx.Reconstruction(method="nearest")
    recipe = tfmq_fx.Recipe(
        weight_bits=bits, edge_weight_bits=bits, edge_activation_bits=8, reconstruction=nearest
    )
    return tfmq_fx.quantize(network or make(ScalarTime), recipe, calibration=vectors())


def kernels_of(low):
    return {k["path"]: k for k in low.report["lowering"]["kernels"]}
