"""The rows that a block learns on."""

import dataclasses

import pytest

import tfmq_fx
from benchmarks.networks.small import FAST, calibration, prepared


@pytest.mark.parametrize("method", ["adaround", "gptq"])
def test_no_more_rows_of_the_calibration_set_are_read_at_once_than_a_batch(monkeypatch, method):
    """They may be memory-mapped, and larger than memory."""
    read, batch, gm = [], tfmq_fx.CalibrationSet.batch, prepared()

    def counting(self, rows):
        read.append(len(rows))
        return batch(self, rows)

    monkeypatch.setattr(tfmq_fx.CalibrationSet, "batch", counting)
    for copies in ("rows", "spread"):
        monkeypatch.setattr(tfmq_fx.CalibrationSet, copies, lambda *_a, **_k: pytest.fail("copied"))
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, method=method, tune_iterations=2))
    assert max(read) <= FAST.batch_size
    assert sum(read) >= 2 * 40
