"""After the blocks, the whole network: nearer to float on what it predicts, or left as it was."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tfmq_fx
from benchmarks.networks.small import (
    FAST,
    TIMESTEPS,
    ScalarTime,
    TinyUNet,
    calibration,
    captured,
    make,
    prepared,
    sinusoid,
)
from tests.helpers.reconstructed import integers, same
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.parallel import Ranks, workers
from tfmq_fx.calibration.data import inputs_of
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.reconstruction import tuning
from tfmq_fx.reconstruction.run import Run
from tfmq_fx.reconstruction.streams import Part
from tfmq_fx.reconstruction.tuning import Memory, weights_to_tune

TUNED = dataclasses.replace(FAST, tune_iterations=40, tune_learning_rate=2e-2)
ALONE = dataclasses.replace(TUNED, method="nearest", temporal_method="nearest")


def error_by_timestep(gm, reference):
    data = calibration()
    inputs = inputs_of(gm, data.tensors)
    with torch.no_grad():
        errors = (gm(*inputs) - reference(*inputs)).square().flatten(1).mean(1)
    return torch.stack([errors[data.tensors["timestep"] == t].mean() for t in TIMESTEPS])


def state(gm):
    """Everything that tuning may touch."""
    touched = integers(gm) | dict(gm.named_parameters())
    return {n: x.detach().clone() for n, x in touched.items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {n for n in before if not torch.equal(before[n], after[n])}


@pytest.mark.parametrize("method", ["nearest", "gptq", "adaround"])
def test_each_timesteps_error_falls_and_the_temporal_block_stays(method):
    gm, plain, network = prepared(), prepared(), captured()
    tfmq_fx.reconstruct(plain, calibration(), dataclasses.replace(FAST, method=method))
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(TUNED, method=method))
    *blocks, result = state_of(gm).reconstruction
    assert [r.name for r in blocks] == [r.name for r in state_of(plain).reconstruction]
    assert (result.name, result.kept) == ("whole network", "tuned")
    assert result.error_nearest == pytest.approx(1.0)
    before, after = error_by_timestep(plain, network), error_by_timestep(gm, network)
    # The result is the mean over timesteps of how much is left of each one's error.
    assert (after / before).mean().item() == pytest.approx(result.error, rel=1e-3)
    assert result.error < 0.97  # second order left the least
    moved = changed(state(plain), state(gm))
    data_path = {
        n for n in state(gm) if n.endswith(("weightq", "weightscale")) and not ("emb" in n or "time" in n)
    }
    assert moved <= data_path
    assert {n for n in data_path if n.endswith("scale")} <= moved
    assert {n for n in moved if n.endswith("q")}


def test_the_network_stays_as_it_was():
    network = make(TinyUNet)
    before = {n: x.clone() for n, x in network.state_dict().items()}
    recipe = tfmq_fx.Recipe(reconstruction=TUNED)
    tfmq_fx.quantize(network, recipe, calibration=calibration())
    assert all(torch.equal(before[n], x) for n, x in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_what_is_converted_is_what_was_tuned():
    gm = prepared()
    tfmq_fx.reconstruct(gm, calibration(), TUNED)
    assert all(p.requires_grad and p.grad is None for p in gm.parameters())
    assert all(o.soft is None and o.steps is None for o, _ in weights_to_tune(gm))
    inputs = inputs_of(gm, calibration().tensors)
    with torch.no_grad():
        fake, real = gm(*inputs), tfmq_fx.convert(gm)(*inputs)
    # A rounding tie of an activation may fall otherwise: a step of 8 bits, seen by few values.
    assert (fake - real).abs().mean() < 1e-4 * fake.abs().mean()


def test_one_thread_and_three_give_the_same_integers():
    runs, threads = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        try:
            gm = tfmq_fx.reconstruct(prepared(), calibration(), dataclasses.replace(ALONE, tune_iterations=5))
            assert state_of(gm).reconstruction[0].kept == "tuned"
            runs.append(state(gm))
        finally:
            torch.set_num_threads(threads)
    assert not changed(runs[0], runs[1])
    assert not changed(runs[0], runs[2])


def test_what_does_not_help_leaves_everything_as_it_was():
    gm = prepared()
    before = state(gm)
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(ALONE, tune_learning_rate=3.0))
    (result,) = state_of(gm).reconstruction
    assert (result.kept, result.error) == ("untuned", result.error_nearest)
    assert not changed(before, state(gm))


def test_a_loss_that_becomes_nan_says_so_and_leaves_everything_as_it_was():
    gm = prepared()
    before = state(gm)
    with pytest.raises(TFMQError, match=r"tuning: the loss became nan at iteration 1; lower .*tune_scale"):
        tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(ALONE, tune_scale_learning_rate=1e5))
    assert not changed(before, state(gm))
    assert all(p.requires_grad for p in gm.parameters())


def test_past_max_memory_it_is_left_out_and_the_report_says_so():
    recipe = tfmq_fx.Recipe(reconstruction=dataclasses.replace(ALONE, max_memory=1e-4))
    q = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration())
    assert q.report["reconstruction"] == []
    (note,) = [n for n in q.report["notes"] if n["name"] == "tuning"]
    assert note["reason"].startswith("skipped: it needs 0.0 GiB, but Reconstruction.max_memory is 0.0001")


def test_it_takes_the_steps_that_tune_flops_pays_for_and_the_report_says_so():
    with FlopCounterMode(display=False) as counter:
        make(TinyUNet)(torch.zeros(1, 1, 8, 8), TIMESTEPS[:1])
    step = 3 * counter.get_total_flops() * ALONE.batch_size  # forward once, backward twice
    for flops, steps in ((2.5 * step, 2), (0.5 * step, 0)):
        gm, settings = prepared(), dataclasses.replace(ALONE, tune_iterations=5)
        tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(settings, tune_flops=flops))
        (note,) = [n for n in state_of(gm).plan.notes if n.name == "tuning"]
        assert note.reason.startswith(f"{steps} of 5 steps: more would cost over Reconstruction.tune_flops")
        paid, plain = state(gm), prepared()
        tfmq_fx.reconstruct(plain, calibration(), dataclasses.replace(settings, tune_iterations=steps))
        assert not changed(paid, state(plain))


def memory(gm, rows):
    for p in gm.parameters():
        p.requires_grad_(False)
    inputs = inputs_of(gm, {n: x[:rows] for n, x in calibration().tensors.items()})
    return Memory.of(gm, inputs, rows, weights_to_tune(gm), TUNED)


def test_a_batch_is_cut_into_as_many_parts_as_memory_asks_for(monkeypatch):
    gm = prepared()
    needs = memory(gm, 1)
    # Of the 25 maps of 8 channels that this network has, 8 x 8 or 4 x 4, most are kept.
    assert 10 * 8 * 64 * 4 < needs.row < 100 * 8 * 64 * 4
    assert memory(gm, 4).row == pytest.approx(
        needs.row, rel=0.25
    )  # some of it, as weights, once for all rows
    seen = []
    split = Run.split
    monkeypatch.setattr(
        Run,
        "split",
        lambda run, chunks, parts, **k: seen.append(parts) or split(run, chunks, parts, **k),
    )
    errors = []
    for limit in (8.0, (needs.state + 2.5 * needs.row) / 2**30):
        gm = prepared()
        tfmq_fx.reconstruct(
            gm, calibration(), dataclasses.replace(ALONE, max_memory=limit, tune_iterations=5)
        )
        errors.append(state_of(gm).reconstruction[0].error)
    assert seen == [2, 16]  # 20 rows, 2.5 of which fit: 8 parts for each of two threads
    assert errors[0] == pytest.approx(errors[1], rel=0.05)  # other sums in the last bits
    assert errors[0] != errors[1]


def test_targets_that_do_not_fit_are_computed_anew(monkeypatch):
    counts, results = [], []
    of, target = Memory.of, tuning.NetworkStreams.target

    def counted(streams, part):
        counts[-1] += part not in streams._targets
        return target(streams, part)

    monkeypatch.setattr(tuning.NetworkStreams, "target", counted)
    for output in (1, 2**50):
        monkeypatch.setattr(Memory, "of", lambda *a, o=output: dataclasses.replace(of(*a), output=o))
        counts.append(0)
        gm = prepared()
        tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(ALONE, tune_iterations=3))
        results.append(integers(gm))
    # Four parts of two batches; measured before and after, and three steps.
    assert counts == [4, 2 * 4 + 3 * 2]
    assert same(*results)


def test_rows_of_a_small_error_weigh_as_much_as_those_of_a_large_one():
    gm, data, network = prepared(), calibration(), captured()
    inputs = inputs_of(gm, data.tensors)
    with torch.no_grad():
        target = network(*inputs)
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
        target += 0.1 * noise * (data.tensors["timestep"] == 0)[:, None, None, None]
    chunks = [[Part(0, 1.0, 0, 40)]]
    with workers(1) as threads:
        streams = tuning.NetworkStreams(
            gm,
            lambda module, _part, _quantized: (module(*inputs),),
            chunks,
            workers=threads,
            ranks=Ranks(),
            target=lambda _part: (target,),
            timesteps=data.tensors["timestep"],
            keep_targets=True,
        )
        streams.measure()
    by_timestep = error_by_timestep(gm, lambda *_: target)
    assert by_timestep.max() > 10 * by_timestep.min()
    for t, expected in zip(TIMESTEPS, by_timestep, strict=True):
        units = streams.units[data.tensors["timestep"] == t]
        torch.testing.assert_close(units, expected.expand_as(units))
    assert streams.error() == pytest.approx(1.0)


def test_a_network_without_error_has_nothing_to_win():
    gm = prepared(weight_bits=8)
    for _, observer in observers(gm):
        observer.disable_fake_quant()
    tfmq_fx.reconstruct(gm, calibration(), ALONE)
    (result,) = state_of(gm).reconstruction
    assert (result.error, result.kept) == (0.0, "untuned")


class Labelled(nn.Module):
    """A label of finitely many values, a weight that is a part of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.table = nn.Linear(8, 8), nn.Embedding(5, 8)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.shift, self.stacked = nn.Parameter(torch.zeros(1, 8)), nn.Parameter(torch.randn(2, 8, 8) / 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        h = self.first(sample) + self.time(sinusoid(timestep, 8)) + self.table(labels)
        h = F.linear(F.gelu(self.norm(h)), self.stacked[0]) + self.shift
        y: Tensor = self.last(F.gelu(h))
        return y


def labelled(rows=40):
    generator = torch.Generator().manual_seed(0)
    return tfmq_fx.CalibrationSet.from_tensors(
        {
            "sample": torch.randn(rows, 8, generator=generator),
            "timestep": TIMESTEPS.repeat(4),
            "labels": torch.arange(rows) % 5,
        }
    )


class Ids(nn.Module):
    """An input without rows: positions, the same in every call, fewer than a batch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.first, self.position = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(3, 8)
        self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        h = self.first(sample) + self.time(sinusoid(timestep, 8))[:, None] + self.position(ids)
        y: Tensor = self.last(h + self.middle(F.gelu(h)))
        return y


def with_ids():
    generator = torch.Generator().manual_seed(0)
    sample, ids = torch.randn(40, 5, 8, generator=generator), torch.randn(5, 3, generator=generator)
    return tfmq_fx.CalibrationSet(
        {"sample": sample, "timestep": TIMESTEPS.repeat(4)}, {"ids": ids}, "timestep"
    )


def scalar_time():
    sample = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return tfmq_fx.CalibrationSet.from_tensors({"sample": sample, "timestep": TIMESTEPS.repeat(4)})


@pytest.mark.parametrize(
    ("network", "data", "changes", "rate"),
    [
        (TinyUNet, calibration, {"maintain": "cache"}, 2e-2),
        (TinyUNet, calibration, {"keyed": "all"}, 2e-2),
        (TinyUNet, calibration, {"group_size": 8, "activation_granularity": "token"}, 2e-2),
        (TinyUNet, calibration, {"weight_bits": 3, "activation_bits": 4, "low_rank": 2, "smooth": 0.5}, 2e-2),
        (TinyUNet, calibration, {"unseen": "float"}, 2e-2),
        (Ids, with_ids, {}, 5e-3),
        (Labelled, labelled, {}, 5e-3),
        (ScalarTime, scalar_time, {}, 1e-2),
    ],
)
def test_networks_and_recipes_of_every_kind(network, data, changes, rate):
    settings = dataclasses.replace(TUNED, method="gptq", tune_learning_rate=rate)
    recipe = tfmq_fx.Recipe(reconstruction=settings, **changes)
    q = tfmq_fx.quantize(make(network), recipe, calibration=data(), seed=0)
    result = q.report["reconstruction"][-1]
    assert (result["name"], result["kept"]) == ("whole network", "tuned")
    assert result["error"] < 1.0
    assert all(e["output_relative_mse"] < 0.2 for e in q.report["errors_by_timestep"])
