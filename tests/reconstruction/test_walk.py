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
from tfmq_fx.graph import inputs
from tfmq_fx.graph.inputs import largest_row
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.reconstruction import stage
from tfmq_fx.reconstruction.spill import Budget
from tfmq_fx.reconstruction.streams import Streams, constant_nodes
from tfmq_fx.reconstruction.walk import Walk


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
    constant = {n.name: n.op for n in constant_nodes(gm)}
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


@pytest.mark.parametrize("method", ["adaround", "gptq"])
def test_the_disk_that_the_streams_need_is_known_from_the_capture(monkeypatch, method):
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
    settings = dataclasses.replace(FAST, method=method, max_memory=0.0, shards=1)
    tfmq_fx.reconstruct(prepared(), calibration(), settings)
    assert 0.8 * most[0] <= walks[0]._largest() / 2 <= 1.5 * most[0]


def test_rows_whose_tensors_are_large_are_walked_in_smaller_parts(monkeypatch):
    """Parts are added up, so that a block's error is the same up to the order of addition."""
    settings, found, sizes = dataclasses.replace(FAST, method="gptq"), [], []
    walk = Walk.__init__
    monkeypatch.setattr(
        Walk, "__init__", lambda self, *a: walk(self, *a) or sizes.append({*map(len, self.rows)})
    )
    for rows in (20, 3):
        gm = prepared()
        monkeypatch.setattr(inputs, "LARGEST", rows * largest_row(gm))
        tfmq_fx.reconstruct(gm, calibration(), settings)
        found.append(state_of(gm).reconstruction)
    assert sizes == [{10}, {10}, {2, 3}, {2, 3}]  # 20 rows in 2 shards, each in 1 or 4 parts
    for whole, parts in zip(*found, strict=True):
        assert parts.error_nearest == pytest.approx(whole.error_nearest, rel=0.05)
        assert parts.error == pytest.approx(whole.error, rel=0.2)  # an integer that moved moves later ones


@pytest.mark.parametrize("better", [True, False])
def test_a_block_runs_again_only_if_its_last_integers_were_not_kept(monkeypatch, better):
    runs, outputs, error, count = [], Streams.outputs, Streams.error, iter(range(1000))

    def measured(self):
        error(self)
        return 1000.0 - next(count) if better else 1000.0 + next(count)

    monkeypatch.setattr(Streams, "outputs", lambda self, part: runs.append(part) or outputs(self, part))
    monkeypatch.setattr(Streams, "error", measured)
    gm = prepared()
    tfmq_fx.reconstruct(
        gm, calibration(), dataclasses.replace(FAST, method="gptq", temporal_method="nearest", shards=1)
    )
    results = state_of(gm).reconstruction
    assert {r.kept for r in results} == {"gptq" if better else "nearest"}
    assert len(runs) == len(results) * 2 * (2 if better else 3)  # 2 chunks, each measured twice
