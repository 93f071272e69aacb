"""One walk through the network, block by block."""

import collections

from torch.fx import Interpreter

import tfmq_fx
from benchmarks.networks.small import FAST, calibration, prepared
from tfmq_fx.reconstruction.walk import _constant


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
