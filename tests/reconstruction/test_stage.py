"""Block by block, nearer to float or left as it was."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import (
    FAST,
    TIMESTEPS,
    TinyUNet,
    calibration,
    captured,
    make,
    prepared,
    sinusoid,
)
from tests.helpers.reconstructed import same
from tfmq_fx.observers import PerChannelWeightFakeQuantize
from tfmq_fx.passes import extract_temporal
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.state import state_of, temporal_of


def integers(gm):
    return {
        str(n.args[0].target): o.q.clone()
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
    }


@pytest.mark.parametrize("method", ["adaround", "gptq", "gptq+adaround"])
@pytest.mark.parametrize("temporal_method", [None, "adaround"])
def test_every_block_gets_no_worse_and_most_get_better(method, temporal_method):
    gm = prepared()
    before = integers(gm)
    settings = dataclasses.replace(FAST, method=method, temporal_method=temporal_method)
    tfmq_fx.reconstruct(gm, calibration(), settings)
    results = state_of(gm).reconstruction
    assert results[0].name == "temporal_block"
    assert len(results) == 7
    assert all(r.error <= r.error_nearest for r in results)
    assert results[0].error < 0.7 * results[0].error_nearest
    after = integers(gm)
    assert before.keys() == after.keys()
    if method == "adaround":  # it rounds down or up: no integer moves by more than one from nearest
        learned = [k for k in after if temporal_method or not ("emb" in k or "time" in k)]
        assert all((after[k].int() - before[k].int()).abs().max() <= 1 for k in learned)
    assert any(not torch.equal(after[k], before[k]) for k in after)
    assert all(p.requires_grad and p.grad is None for p in gm.parameters())  # the network is as it was


def test_the_same_seed_gives_the_same_integers():
    runs = []
    for _ in range(2):
        gm = prepared()
        tfmq_fx.reconstruct(gm, calibration(), seed=7)
        runs.append(integers(gm))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize("method", ["adaround", "gptq"])
def test_one_thread_and_three_give_the_same_integers(method):
    """Recording aside, the whole way from the float network; three threads for two parts, too."""
    runs, threads = [], torch.get_num_threads()
    settings = dataclasses.replace(FAST, method=method, learn_activation_scale=True)
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        try:
            gm = prepared()
            tfmq_fx.reconstruct(gm, calibration(), settings)
            assert torch.get_num_threads() == n
        finally:
            torch.set_num_threads(threads)
        runs.append(tfmq_fx.convert(gm).state_dict())
    assert all(torch.equal(run[k], runs[0][k]) for run in runs[1:] for k in runs[0])


def test_nearest_learns_nothing():
    gm = prepared()
    before = integers(gm)
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, method="nearest"))
    assert all(torch.equal(before[k], v) for k, v in integers(gm).items())


def test_the_temporal_block_can_be_reconstructed_alone_and_left_alone():
    alone, left = prepared(), prepared()
    before = integers(alone)
    tfmq_fx.reconstruct(
        alone, calibration(), dataclasses.replace(FAST, method="nearest", temporal_method="gptq")
    )
    tfmq_fx.reconstruct(left, calibration(), dataclasses.replace(FAST, temporal_method="nearest"))
    assert [r.name for r in state_of(alone).reconstruction] == ["temporal_block"]
    assert "temporal_block" not in {r.name for r in state_of(left).reconstruction}
    temporal = {k for k in before if "emb" in k or "time" in k}
    assert {k for k, q in integers(alone).items() if not torch.equal(q, before[k])} <= temporal
    assert not {k for k, q in integers(left).items() if not torch.equal(q, before[k])} & temporal


def test_second_order_on_the_temporal_block_beats_learning_it():
    """Ten timesteps, at most 32 columns: the least-squares step leaves AdaRound nothing."""
    errors = {}
    for method in ("gptq", "adaround"):
        gm = prepared()
        tfmq_fx.reconstruct(
            gm, calibration(), dataclasses.replace(FAST, method="nearest", temporal_method=method)
        )
        errors[method] = state_of(gm).reconstruction[0].error
    assert errors["gptq"] < 0.5 * errors["adaround"]


def test_one_calibration_row_is_enough_to_run():
    """A batch of one row has one part, whatever `shards` says."""
    gm = captured()
    recipe = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=FAST)
    one = calibration(rows=1)
    for method in ("adaround", "gptq+adaround"):
        prepared_ = tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), one)
        tfmq_fx.reconstruct(prepared_, one, dataclasses.replace(FAST, method=method))
        assert all(r.error <= r.error_nearest for r in state_of(prepared_).reconstruction)
        y = tfmq_fx.convert(prepared_)(**one.tensors)
        assert torch.isfinite(y).all()


class NoWeightsInside(torch.nn.Module):
    """The temporal block and the residual branch hold no weight at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.conv_in(sample)
        h = h + F.silu(h * sinusoid(timestep, 8)[:, :, None, None])
        y: Tensor = self.conv_out(h)
        return y


def test_blocks_without_weights_are_passed_through():
    recipe = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=FAST)
    gm = tfmq_fx.prepare(captured(NoWeightsInside), recipe, timesteps=TIMESTEPS)
    tfmq_fx.reconstruct(tfmq_fx.calibrate(gm, calibration()), calibration())
    assert [r.name for r in state_of(gm).reconstruction] == ["conv_in.weight", "conv_out.weight"]


def test_blocks_are_reconstructed_on_the_features_that_they_will_look_up():
    """So they get the integers that they would beside a temporal block left in float."""

    def integers(**changes):
        recipe = tfmq_fx.Recipe(
            reconstruction=tfmq_fx.Reconstruction(method="gptq", tune_iterations=5), **changes
        )
        gm = tfmq_fx.capture(make(TinyUNet), {n: x[:2] for n, x in calibration().tensors.items()})
        gm = tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), calibration())
        gm = tfmq_fx.reconstruct(gm, calibration())
        temporal = {x.node for x in state_of(gm).plan.layers if x.temporal}
        assert len(temporal) == 4
        block = extract_temporal(gm, temporal_of(gm))
        for _, o in observers(block):  # as they were
            assert o.fake_quant_enabled[0]
        return {
            x.path: dict(observers(gm))[nodes(gm)[x.node].args[1]].q
            for x in state_of(gm).plan.layers
            if not x.temporal
        }

    def nodes(gm):
        return {n.name: n for n in gm.graph.nodes}

    float_block = tuple(
        tfmq_fx.Rule(pattern=p, weight_bits=16, activation_bits=16) for p in ("time_mlp.*", "*.emb.*")
    )
    cached, beside_float = integers(maintain="cache"), integers(rules=float_block)
    other = integers()
    assert all(torch.equal(q, beside_float[path]) for path, q in cached.items())
    assert not all(torch.equal(q, other[path]) for path, q in cached.items())


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_the_rounding_of_activations_does_not_reach_the_weights_of_the_blocks_unless_asked(method):
    """It is noise, for which least squares would make every layer smaller."""

    def chosen(activation_bits, **changes):
        gm = prepared(weight_bits=4, activation_bits=activation_bits, maintain="cache")
        settings = dataclasses.replace(FAST, method=method, tune_iterations=0, **changes)
        tfmq_fx.reconstruct(gm, calibration(), settings)
        assert all(o.fake_quant_enabled[0] for _, o in observers(gm))
        return integers(gm)

    assert same(chosen(4), chosen(8))
    asked = [{"corrected": True}]  # to make up for it
    if method == "adaround":  # or to learn the scales of activations, which are quantized meanwhile
        asked.append({"learn_activation_scale": True})
    for changes in asked:
        assert not same(chosen(4, **changes), chosen(8, **changes))


class Accumulates(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.time = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4), torch.nn.Linear(1, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, sample, timestep):
        h = self.first(sample) + self.time(timestep[:, None] / 1000)
        for layer in self.layers:
            h += layer(h)
        return self.last(h)


def accumulated():
    t = torch.tensor([900.0, 500, 100]).repeat(16)
    return tfmq_fx.CalibrationSet.from_tensors({"sample": torch.randn(48, 4), "timestep": t})


def test_a_network_that_adds_in_place_is_as_near_as_one_that_does_not():
    """A block is run several times: what it adds to another's value it would add each time."""
    network, data = make(Accumulates), accumulated()
    recipe = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="gptq", tune_iterations=0))
    q = tfmq_fx.quantize(network, dataclasses.replace(recipe, weight_bits=8), calibration=data)
    given = data.arguments(slice(0, 48))
    with torch.no_grad():
        expected = network(**given)
        assert (q(**given) - expected).norm() < 0.01 * expected.norm()  # 8 bits; 0.3 where it is added again


def test_a_graph_whose_blocks_write_to_others_is_refused_before_anything_is_learned():
    data = accumulated()
    program = torch.export.export(make(Accumulates), (), data.arguments(slice(0, 2)), strict=False)
    gm = torch.fx.GraphModule(program.module(check_guards=False), program.module(check_guards=False).graph)
    gm.graph.set_codegen(torch.fx.graph.CodeGen())
    output = gm.graph.output_node()
    output.args = (output.args[0][0],)
    gm.recompile()
    ready = tfmq_fx.calibrate(
        tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=data.timesteps), data.rows(torch.arange(2))
    )
    with pytest.raises(
        tfmq_fx.TFMQError, match=r"reconstruct: node add_\S* .* changes \S+ in place, which others read"
    ):
        tfmq_fx.reconstruct(ready, data.rows(torch.arange(2)), FAST)
