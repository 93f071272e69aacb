from functools import partial

import pytest
import torch
from torch.fx.passes.infra import pass_manager
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS
from tests.helpers.graphs import BATCH, RECIPE, T, X, compiled, exported, traced
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.passes import (
    PassManager,
    bind_parameters,
    find_temporal,
    inline_modules,
    insert_step_index,
    literal_dtypes,
    partition_temporal,
    remove_noops,
    root_batch_size,
)

MAKERS = {"torch.export": exported, "symbolic_trace": traced, "torch.compile": compiled}


def inputs(gm, x=X, t=T):
    """By name, because Dynamo has its own order."""
    return [t if "timestep" in name else x for name in placeholders(gm)]


def structural(name):
    return [
        partial(bind_parameters, example_inputs=[X, T]),
        inline_modules,
        remove_noops,
        literal_dtypes,
        partial(root_batch_size, timestep=name),
        partial(insert_step_index, timesteps=TIMESTEPS, timestep=name),
    ]


@pytest.mark.parametrize("manager", [pass_manager.PassManager, PassManager])
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_structural_passes_are_bitwise_in_both_managers(maker, manager):
    gm, name = maker()
    with torch.no_grad():
        expected = gm(*inputs(gm))
        passes = [
            *structural(name),
            lambda g: partition_temporal(g, temporal=find_temporal(g, timestep=name)),
        ]
        result = manager(passes)(gm)
        assert result.modified
        got = result.graph_module(*inputs(result.graph_module))
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    assert len(result.graph_module.graph.find_nodes(op="call_module", target="temporal_block")) == 1
    assert len(result.graph_module.temporal_block.graph.output_node().args[0]) == 2


@pytest.mark.parametrize("manager", [pass_manager.PassManager, PassManager])
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_the_whole_way_to_integers_in_both_managers(maker, manager):
    gm, name = maker()
    x_name = next(n for n in placeholders(gm) if "timestep" not in n)
    t_name = next(n for n in placeholders(gm) if "timestep" in n)
    data = tfmq_fx.CalibrationSet.from_tensors(
        {x_name: BATCH["sample"], t_name: BATCH["timestep"]}, timestep=t_name
    )
    passes = [
        *structural(name)[:-1],
        partial(tfmq_fx.prepare, recipe=RECIPE, timesteps=TIMESTEPS),
        partial(tfmq_fx.calibrate, calibration=data, batch_size=20),
        partial(tfmq_fx.reconstruct, calibration=data, seed=0),
        tfmq_fx.convert,
    ]
    with torch.no_grad():
        (expected,) = pytree.tree_leaves(gm(*inputs(gm)))
        if manager is pass_manager.PassManager:  # torch's wants a PassResult; ours takes what a pass returns
            passes = [pass_manager.pass_result_wrapper(p) for p in passes]
        q = manager(passes)(gm).graph_module
        (got,) = pytree.tree_leaves(q(*inputs(q)))
    error = (got - expected).square().mean() / expected.square().mean()
    assert 0 < error < 0.01  # 4-bit weights of a random network; round-to-nearest gives 0.02
    assert q.graph.find_nodes(op="call_module", target="temporal_block")
    weights = [n for n in q.graph.nodes if "dequantize_per_channel" in str(n.target)]
    assert len(weights) == 10  # and four more inside the block
