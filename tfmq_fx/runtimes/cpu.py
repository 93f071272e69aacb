"""Find out which int8 and bfloat16 instructions this machine's CPU has."""

from __future__ import annotations

import torch

from tfmq_fx.base.arithmetic import ByteSums

# Instructions that multiply bytes: VNNI in its two encodings, AMX, and Arm's dot products.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "dotprod", "i8mm")


def torch_has_bfloat16() -> bool:
    """Return True if torch's kernels compute in bfloat16 on this CPU."""
    has = dict(torch.cpu.get_capabilities())
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def int8_instructions() -> list[str]:
    """Return the INT8_INSTRUCTIONS that this CPU has."""
    has = dict(torch.cpu.get_capabilities())
    return [name for name in INT8_INSTRUCTIONS if has.get(name)]


def adds_pairs() -> bool:
    """Return True if this CPU can multiply bytes with AVX2; see `arithmetic.PAIRS_FIT`."""
    return bool(dict(torch.cpu.get_capabilities()).get("avx2"))


def byte_sums() -> ByteSums:
    """Return how this CPU sums products of bytes."""
    if int8_instructions():
        return ByteSums.EXACT
    return ByteSums.PAIRS if adds_pairs() else ByteSums.NONE
