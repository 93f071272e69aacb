"""Streams past max_memory: on disk, in half precision, near the same result, nothing left behind."""

import collections
import dataclasses
import tempfile

import pytest
import torch
from torch.fx import Graph, Interpreter

import tfmq_fx
from benchmarks.networks.small import FAST, calibration, prepared
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.reconstruction.spill import Budget, Values
from tfmq_fx.reconstruction.walk import _constant


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
        errors[limit] = [r.error for r in gm.meta["reconstruction"]]
    assert errors[0.0][0] == errors[8.0][0]  # the temporal block has no streams
    for on_disk, in_memory in zip(errors[0.0], errors[8.0], strict=True):
        assert on_disk < 1.2 * in_memory  # other integers here and there: float16 targets differ by 5e-4
    assert errors[0.0] != errors[8.0]
    assert not list(folder.iterdir())


def test_the_walk_runs_each_node_once_a_batch_and_stream(monkeypatch):
    """O(1) forwards of the network, not O(blocks): outside the blocks' own learning each node runs once."""
    counts = collections.Counter()
    run_node = Interpreter.run_node

    def counting(self, n):
        counts[n.name] += 1
        return run_node(self, n)

    monkeypatch.setattr(Interpreter, "run_node", counting)
    gm = prepared()
    tfmq_fx.reconstruct(gm, calibration(), FAST)
    parts = -(-40 // FAST.batch_size) * FAST.shards
    # What is made of weights alone is the same for all rows. Elsewhere each part runs each node.
    constant = {n.name: n.op for n in _constant(gm)}
    assert {"get_attr", "call_module"} == {constant[n] for n in counts if n in constant}
    # Float and quantized; an observer outside the blocks is only in the quantized network.
    expected = {
        name: (1 if name in constant else parts) * (1 if name.startswith("activation_post_process") else 2)
        for name in counts
    }
    assert counts == expected


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
