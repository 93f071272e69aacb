"""One walk through the network, block by block."""

import collections
import dataclasses
import shutil
from types import SimpleNamespace

import pytest
from torch.fx import Interpreter

import tfmq_fx
from benchmarks.networks.small import FAST, calibration, prepared
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.reconstruction import stage
from tfmq_fx.reconstruction.spill import Budget
from tfmq_fx.reconstruction.walk import Walk, _constant


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


def test_a_disk_too_small_for_the_streams_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(stage, "_reconstruct_temporal", lambda *_: pytest.fail("worked"))
    with pytest.raises(
        TFMQError, match=r"streams need about .* GiB of disk beyond max_memory, .* set TMPDIR"
    ):
        tfmq_fx.reconstruct(prepared(), calibration(), dataclasses.replace(FAST, max_memory=0.0))


def test_the_disk_that_the_streams_need_is_known_from_the_capture(monkeypatch):
    """With nothing in memory, all values that are held at once are on disk, half of their bytes."""
    walks, most = [], [0]
    monkeypatch.setattr(Walk, "require_disk", lambda self: walks.append(self))
    spill = Budget.spill

    def counting(self, x):
        found = spill(self, x)
        files = [f.stat().st_size for f in found.file.parent.iterdir()]
        most[0] = max(most[0], sum(files))
        return found

    monkeypatch.setattr(Budget, "spill", counting)
    tfmq_fx.reconstruct(prepared(), calibration(), dataclasses.replace(FAST, max_memory=0.0, shards=1))
    assert 0.8 * most[0] <= walks[0]._largest() / 2 <= 1.5 * most[0]
