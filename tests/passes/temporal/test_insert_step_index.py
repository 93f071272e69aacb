"""The row of the table that a timestep reads."""

import torch

from benchmarks.networks.small import TIMESTEPS, captured
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes.temporal.insert_step_index import insert_step_index, step_index


def test_the_step_index_is_computed_once_and_nearest():
    gm = captured()
    assert insert_step_index(gm, timesteps=TIMESTEPS).modified
    assert not insert_step_index(gm, timesteps=TIMESTEPS).modified
    assert [op_name(n) for n in gm.graph.nodes].count("argmin") == 1
    index = torch.fx.Interpreter(gm)
    gm.graph.output_node().args = (step_index(gm),)
    values = torch.tensor([900, 0, 449, 451, 5000, 100])
    assert index.run(torch.zeros(6, 1, 8, 8), values).tolist() == [0, 9, 5, 4, 0, 8]
