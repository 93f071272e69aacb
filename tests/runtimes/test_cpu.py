"""What a CPU does with bytes."""

import pytest

from tfmq_fx.base.arithmetic import ByteSums
from tfmq_fx.runtimes import cpu


@pytest.mark.parametrize(
    ("has", "sums", "instructions"),
    [
        ({"avx512_vnni": True, "avx2": True}, ByteSums.EXACT, ["avx512_vnni"]),
        ({"avx_vnni": True, "amx_int8": True}, ByteSums.EXACT, ["avx_vnni", "amx_int8"]),
        ({"dotprod": True}, ByteSums.EXACT, ["dotprod"]),
        ({"avx2": True, "avx512_vnni": False}, ByteSums.PAIRS, []),
        ({}, ByteSums.NONE, []),
    ],
)
def test_byte_sums_follow_from_the_instructions(monkeypatch, has, sums, instructions):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: has)
    assert cpu.byte_sums() is sums
    assert cpu.int8_instructions() == instructions
