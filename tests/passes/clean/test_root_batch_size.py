"""The batch's size, and what is a function of it alone."""

import torch
from torch import nn

from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import meta_value
from tfmq_fx.passes import bind_parameters, find_temporal, partition_temporal, root_batch_size


def test_a_size_that_dynamo_passes_does_not_taint():
    """With dynamic shapes the batch is an input of its own, here used to broadcast the timestep."""

    class Broadcasts(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.body = nn.Linear(1, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            t = timestep.expand(sample.shape[0]).float()[:, None]
            return self.body(sample) + self.time(t)

    kept = []

    def backend(gm, example_inputs):
        kept.append(bind_parameters(gm, example_inputs=example_inputs).graph_module)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Broadcasts().eval(), backend=backend, dynamic=True)(torch.randn(3, 4), torch.ones(3))
    (gm,) = kept
    assert any(isinstance(meta_value(n), torch.SymInt) for n in placeholders(gm).values())
    assert find_temporal(gm).keys == ("L_timestep_",)
    assert root_batch_size(gm).modified
    partition_temporal(gm)
    (call,) = gm.graph.find_nodes(op="call_module")
    assert [str(n.target) for n in call.args] == ["L_timestep_"]
