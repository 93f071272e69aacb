"""Streams past max_memory: on disk, in half precision, near the same result, nothing left behind."""

import dataclasses
import tempfile

import pytest
import torch
from torch.fx import Graph

import tfmq_fx
from benchmarks.networks.small import FAST, calibration, prepared
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.reconstruction.spill import Budget, Values


def node():
    return Graph().create_node("call_function", torch.relu)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_exceeds_the_limit_goes_to_disk_and_comes_back(folder):
    big, small = torch.randn(4, 100), torch.randn(10)
    a, b, c, d = (node() for _ in range(4))
    with Budget(100) as budget:
        values = Values(budget)
        values[a], values[b] = big, small
        assert (values.used, budget.spilled) == (40, 800)
        assert len(list(folder.glob("*/*.bin"))) == 1
        torch.testing.assert_close(values[a], big, rtol=2**-11, atol=1e-7)  # float16's half step
        assert values[b] is small
        values[c], values[d] = big * 1e6, torch.arange(400)
        torch.testing.assert_close(values[c], big * 1e6, rtol=2**-8, atol=1.0)  # past float16: bfloat16
        assert torch.equal(values[d], torch.arange(400))
        assert set(values) == {a, b, c, d}
        del values[a], values[b]
        assert values.used == 0
        assert len(list(folder.glob("*/*.bin"))) == 2
    assert not list(folder.iterdir())


def test_what_is_lent_is_read_anew_and_not_held(folder):
    with Budget(0) as budget:
        values, a, reads = Values(budget), node(), []
        values.lend(a, lambda: reads.append(1) or torch.ones(3))
        assert torch.equal(values[a], values[a])
        assert len(reads) == 2
        assert (values.used, budget.spilled, set(values)) == (0, 0, {a})
        del values[a]
        assert not set(values)
    assert not list(folder.iterdir())


def test_a_disk_that_is_full_is_one_clear_error(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with (
        Budget(0) as budget,
        pytest.raises(TFMQError, match=r"exceed max_memory and cannot be spilled .*No space left"),
    ):
        Values(budget)[node()] = torch.ones(3)
    assert not list(folder.iterdir())


def test_a_reconstruction_with_everything_on_disk_is_as_good(folder):
    errors = {}
    for limit in (8.0, 0.0):
        gm = prepared()
        tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, max_memory=limit))
        errors[limit] = [r.error for r in state_of(gm).reconstruction]
    assert errors[0.0][0] == errors[8.0][0]  # the temporal block has no streams
    for on_disk, in_memory in zip(errors[0.0], errors[8.0], strict=True):
        assert on_disk < 1.2 * in_memory  # other integers here and there: float16 targets differ by 5e-4
    assert errors[0.0] != errors[8.0]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("limit", [0.0, 8.0])
def test_weights_outside_the_blocks_are_neither_counted_nor_written_for_each_part(folder, monkeypatch, limit):
    largest, spilled = [], Budget.spill
    monkeypatch.setattr(Budget, "spill", lambda self, x: largest.append(x.numel()) or spilled(self, x))
    gm = prepared()
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, max_memory=limit, shards=1))
    assert bool(largest) == (limit == 0)
    # The temporal block's second layer has 32 x 32 weights, a part's rows nothing of that size.
    assert 32 * 32 not in largest
    assert not list(folder.iterdir())
