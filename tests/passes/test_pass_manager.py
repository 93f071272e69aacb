"""Our passes in other people's pipelines: torch.fx's PassManager and ours, on graphs of three makers."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.passes.infra import pass_manager
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, TinyUNet, calibration, make
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import meta_value, op_name
from tfmq_fx.observers import PerChannelWeightFakeQuantize
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
from tfmq_fx.passes.quantize.observed import observers

BATCH = calibration().tensors
X, T = BATCH["sample"][:20], BATCH["timestep"][:20]
RECIPE = dataclasses.replace(tfmq_fx.Recipe.preset("w4a8"), reconstruction=FAST)


def exported():
    return tfmq_fx.capture(make(TinyUNet), {"sample": X, "timestep": T}), None


def traced():
    gm = symbolic_trace(make(TinyUNet))
    assert inline_modules(gm).modified
    return gm, None


def compiled():
    """The graph that a torch.compile backend gets, parameters bound, with how to call it."""
    kept = []

    def backend(gm, example_inputs):
        kept.append(bind_parameters(gm, example_inputs=example_inputs).graph_module)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(make(TinyUNet), backend=backend)(X, T)
    (gm,) = kept
    return gm, "L_timestep_"


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


def test_our_manager_lists_every_violation_before_anything_runs():
    ran = []
    gm, _ = exported()

    def note(gm):
        ran.append(gm)

    order = [
        note,
        tfmq_fx.convert,
        partition_temporal,
        partial(tfmq_fx.prepare, recipe=RECIPE, timesteps=TIMESTEPS),
        root_batch_size,
    ]
    with pytest.raises(TFMQError) as error:
        PassManager(order)(gm)
    assert str(error.value) == (
        "passes: convert needs calibrate before it; root_batch_size must come before partition_temporal; "
        "prepare must come before partition_temporal; root_batch_size must come before prepare."
    )
    assert not ran


def test_a_pass_added_later_is_checked_too():
    gm, _ = exported()
    manager = PassManager([remove_noops])
    manager.add_pass(tfmq_fx.convert)
    with pytest.raises(TFMQError, match="passes: convert needs calibrate before it"):
        manager(gm)


def test_our_manager_goes_on_from_where_the_graph_stands():
    gm, _ = exported()
    prepared = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS)
    result = PassManager([partial(tfmq_fx.calibrate, calibration=calibration()), tfmq_fx.convert])(prepared)
    assert result.graph_module.meta["stage"] == "converted"


def test_a_passs_own_error_comes_through():
    gm, _ = exported()
    with pytest.raises(TFMQError, match="timesteps: hold repeated values"):
        PassManager([partial(tfmq_fx.prepare, recipe=RECIPE, timesteps=torch.tensor([1, 1]))])(gm)


# ---- inline_modules


def test_inlining_leaves_functions_with_the_parameters_own_paths():
    gm = symbolic_trace(make(TinyUNet))
    with torch.no_grad():
        expected = gm(X, T)
        assert inline_modules(gm).modified
        assert torch.equal(gm(X, T), expected)
    assert not gm.graph.find_nodes(op="call_module")
    named = dict(make(TinyUNet).named_parameters())
    assert {str(n.target) for n in gm.graph.find_nodes(op="get_attr")} >= set(named)
    assert not inline_modules(gm).modified


def test_a_module_that_cannot_be_followed_stays_and_is_reported():
    class Branch(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.odd, self.body = nn.Linear(1, 4), Branch(4, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return self.odd(self.body(sample) + self.time(timestep.float()[:, None]))

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m, _name):
            return isinstance(m, nn.Linear)

    network = Net().eval()
    gm = torch.fx.GraphModule(network, Leaves().trace(network))
    inline_modules(gm)
    assert [n.target for n in gm.graph.find_nodes(op="call_module")] == ["odd"]
    prepared = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS)
    assert ("odd", "a module call that inline_modules could not follow") in {
        (f.name, f.reason) for f in prepared.meta["plan"].floats
    }


# ---- literal_dtypes


def test_casts_to_another_tensors_dtype_become_literal():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.emb = nn.Linear(1, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            t = self.time(timestep.float()[:, None]).type_as(sample)
            return sample + self.emb(F.silu(t))

    network = Casts().eval()
    x, t = torch.randn(2, 4), torch.tensor([1, 2])
    with torch.no_grad():
        gm = torch.export.export(network, (x, t), strict=False).module()
        assert "type_as" in {op_name(n) for n in gm.graph.nodes}
        expected = gm(x, t)
        assert literal_dtypes(gm).modified
        assert torch.equal(gm(x, t), expected)
    assert "type_as" not in {op_name(n) for n in gm.graph.nodes}
    assert not literal_dtypes(gm).modified
    assert not literal_dtypes(symbolic_trace(network)).modified  # no fake values, nothing known


# ---- bind_parameters


def test_binding_takes_what_the_compiler_lifted():
    gm, _ = compiled()
    assert list(placeholders(gm)) == ["L_timestep_", "L_sample_"]
    assert not bind_parameters(gm, example_inputs=[T, X]).modified
    with torch.no_grad():
        (got,) = gm(T, X)
        assert torch.equal(got, make(TinyUNet)(X, T))


def test_binding_needs_an_example_of_every_input():
    gm, _ = compiled()
    with pytest.raises(TFMQError, match="example_inputs: 1 given, the graph takes 2"):
        bind_parameters(gm, example_inputs=[T])


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


# ---- another quantizer


def test_another_quantizer_takes_the_data_path_and_ours_keeps_the_block():
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    gm, _ = exported()
    x86 = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS, data_quantizer=x86)
    weights = {
        str(n.args[0].target) for n, o in observers(prepared) if isinstance(o, PerChannelWeightFakeQuantize)
    }
    block = {"time_mlp.0.weight", "time_mlp.2.weight", "down_block.emb.weight", "up_block.emb.weight"}
    assert weights == block
    assert {layer.path for layer in prepared.meta["plan"].layers} == block
    theirs = {n.name for n in prepared.meta["plan"].notes if n.reason == "annotated by X86InductorQuantizer"}
    left = [
        f for f in prepared.meta["plan"].floats if f.reason == "X86InductorQuantizer does not annotate it"
    ]
    assert len(theirs) + len(left) == 10  # every other convolution and linear is one or the other
    if not theirs:
        pytest.skip(
            "this torch's export leaves no source for X86InductorQuantizer to match; reported as float"
        )
    tfmq_fx.calibrate(prepared, calibration())
    tfmq_fx.reconstruct(prepared, calibration())
    assert [r.name for r in prepared.meta["reconstruction"]] == ["temporal_block"]
    q = tfmq_fx.convert(prepared)
    with torch.no_grad():
        error = (q(X, T) - gm(X, T)).square().mean() / gm(X, T).square().mean()
    assert 0 < error < 0.003
    assert not any(
        x.dtype == torch.float32 and x.dim() > 1 for x in q.state_dict().values()
    )  # their weights are folded
