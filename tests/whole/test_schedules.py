"""Schedules as samplers have them: float and shifted timesteps, repeats, odd step counts, any order."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as DDIM
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import ResBlock, TinyUNet, calibration, make, sinusoid
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes.temporal.insert_step_index import insert_step_index, step_index

# Upstream's, where a scheduler makes its sigmas with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Round-to-nearest, whose result cannot depend on the order of the table: qparams are all that is asked here.
RECIPE = tfmq_fx.Recipe(weight_bits=8, reconstruction=tfmq_fx.Reconstruction(method="nearest"))


class Growing(nn.Module):
    """The embedding grows twentyfold over the schedule, as sigma does: another timestep's qparams are wrong here."""

    def __init__(self):
        super().__init__()
        self.time1, self.time2 = nn.Linear(16, 32), nn.Linear(32, 32)
        self.conv_in, self.conv_out = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.block1, self.block2 = ResBlock(8, 8, 32), ResBlock(8, 8, 32)

    def temporal(self, timestep):
        """The embedding, and what the linear layers of the temporal block read, which is quantized."""
        waves = sinusoid(timestep, 16)
        hidden = F.silu(self.time1(waves))
        emb = self.time2(hidden) * torch.exp(0.003 * timestep.float())[:, None]
        return emb, (waves, hidden, F.silu(emb))

    def forward(self, sample, timestep):
        emb, _ = self.temporal(timestep)
        return self.conv_out(self.block2(self.block1(self.conv_in(sample), emb), emb))


class Quadratic(DDIM):  # type: ignore[misc]  # untyped upstream
    """DDIM's timesteps for CIFAR-10, the first of which fall on the same integers; diffusers has none like it."""

    def set_timesteps(self, num_inference_steps):
        super().set_timesteps(num_inference_steps)
        values = (np.linspace(0, np.sqrt(1000 * 0.8), num_inference_steps) ** 2).astype(int)
        self.timesteps = torch.from_numpy(values).flip(0)


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SCHEDULES = {
    "flow": (lambda: FlowMatch(shift=3.0), 50),
    "karras": (lambda: EulerDiscreteScheduler(use_karras_sigmas=True), 20),
    "zero snr": (lambda: DDIM(timestep_spacing="trailing", **ZERO_SNR), 50),
    "dpm": (lambda: DPMSolverMultistepScheduler(), 20),
    "quadratic": (lambda: Quadratic(), 100),
    "30 of 1000": (lambda: DDIM(), 30),
    "7 of 1000": (lambda: DDIM(timestep_spacing="linspace"), 7),
}
# Of each kind one: float timesteps, sigmas, repeats, an odd step count. The rest are `slow`.
FEW = ("flow", "karras", "quadratic", "7 of 1000")
every_schedule = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in SCHEDULES]
)


def scheduled(name, steps=None):
    factory, usual = SCHEDULES[name]
    scheduler = factory()
    scheduler.set_timesteps(steps or usual)
    return scheduler


@torch.no_grad()
def trajectory(network, scheduler, x):
    """The last sample, and every (sample, timestep) of the network's calls, timesteps as the scheduler has them."""
    x, calls = x * getattr(scheduler, "init_noise_sigma", 1.0), []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        calls.append((scaled, t.repeat(len(x))))
        x = scheduler.step(network(*calls[-1]), t, x).prev_sample
    return x, calls


def noise(rows, seed=2):
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@functools.cache
def recorded(name):
    x, t = zip(*trajectory(make(Growing), scheduled(name), noise(4, seed=1))[1], strict=True)
    return tfmq_fx.CalibrationSet.from_tensors({"sample": torch.cat(x), "timestep": torch.cat(t)})


@functools.cache
def quantized(name, unseen="nearest"):
    recipe = dataclasses.replace(RECIPE, unseen=unseen)
    return tfmq_fx.quantize(make(Growing), recipe, calibration=recorded(name))


def tables(q, kind="scale"):
    return {n: b for n, b in q.network.named_buffers() if n.endswith(f"_by_timestep.{kind}")}


def test_the_schedules_are_what_their_names_say():
    """Otherwise a change of diffusers would leave the tests below with nothing to show."""
    assert all((scheduled(n).timesteps % 1 != 0).any() for n in ("flow", "karras"))
    assert scheduled("zero snr").alphas_cumprod[scheduled("zero snr").timesteps[0]] == 0
    assert {scheduled(n).timesteps.dtype for n in SCHEDULES} == {torch.float32, torch.int64}
    repeats = scheduled("quadratic").timesteps.tolist()
    assert (len(repeats), len(set(repeats)), repeats.count(0)) == (100, 96, 4)
    uneven = [scheduled(n).timesteps[:3].tolist() for n in ("30 of 1000", "7 of 1000")]
    assert uneven == [[957, 924, 891], [999, 832, 666]]


@every_schedule
def test_the_table_is_the_set_of_the_schedules_values(name, tmp_path):
    q, scheduler = quantized(name), scheduled(name)
    assert sorted(q.timesteps.tolist()) == sorted(set(scheduler.timesteps.tolist()))
    assert [len(table) for table in tables(q).values()] == [len(q.timesteps)] * 4
    q.save_pretrained(tmp_path / "q")
    for model in (
        q,
        tfmq_fx.load(tmp_path / "q"),
    ):  # a float through JSON must still be the table's very value
        assert model.timesteps.dtype == scheduler.timesteps.dtype
        final, _ = trajectory(model, scheduled(name), noise(2))
        assert torch.isfinite(final).all()
        assert model.report["unseen_timesteps"] == {}


@every_schedule
def test_each_timestep_has_the_range_of_its_own_activations(name):
    q = quantized(name)
    with torch.no_grad():
        _, activations = make(Growing).temporal(q.timesteps)
    lows = [x.amin(1).clamp(max=0) for x in activations]
    scales = [(x.amax(1).clamp(min=0) - low) / 255 for x, low in zip(activations, lows, strict=True)]
    matched = set()
    for scale, zero_point in zip(tables(q).values(), tables(q, "zero_point").values(), strict=True):
        (i,) = (i for i, own in enumerate(scales) if torch.allclose(scale, own, rtol=1e-5))
        assert ((zero_point + lows[i] / scale).abs() < 0.501).all()  # rounded to the nearest, ties either way
        matched.add(i)
    assert matched == {0, 1, 2}


@every_schedule
def test_the_order_of_the_timesteps_does_not_matter(name):
    q, data = quantized(name), recorded(name)
    order = torch.randperm(len(q.timesteps), generator=torch.Generator().manual_seed(3))
    assert not torch.equal(order, order.sort().values)
    other = tfmq_fx.quantize(make(Growing), RECIPE, calibration=data, timesteps=q.timesteps[order])
    for kind in ("scale", "zero_point"):
        shuffled = tables(other, kind)
        assert all(torch.equal(table[order], shuffled[n]) for n, table in tables(q, kind).items())
    with torch.no_grad():
        assert torch.equal(q(**data.tensors), other(**data.tensors))


def relative_error(q, steps):
    """Of the trajectory's displacement, against the float network's from the same noise."""
    x = noise(16, seed=7)
    expected, _ = trajectory(make(Growing), scheduled("flow", steps), x)
    got, _ = trajectory(q, scheduled("flow", steps), x)
    return ((got - expected).norm() / (expected - x).norm()).item()


@pytest.mark.parametrize("steps", [20, 28])
def test_another_step_count_takes_the_nearest_timesteps_and_counts_them(steps):
    q = copy.deepcopy(quantized("flow"))
    calibrated, error = relative_error(q, 50), relative_error(q, steps)
    values = set(scheduled("flow", steps).timesteps.tolist()) - set(scheduled("flow").timesteps.tolist())
    assert 0 < len(values) < steps  # the schedules share their ends
    assert q.report["unseen_timesteps"] == {
        str(v): 1 for v in values
    }  # calls of the network with it, not rows
    # A neighbour is at most 29 of 1000 away, over which this embedding grows by 9% and its fastest waves turn: what
    # lies outside the neighbour's range is clipped. The temporal features are then off by 6 to 13%, not by 0.8, and
    # the trajectory, whose other activations err as before, by 1.2 to 1.7 times as much (three seeds).
    assert error < 2 * calibrated < 0.05
    table = q.temporal_block.get_buffer("timestep_table")
    table.copy_(
        table.flip(0)
    )  # the control, far outside that bound: some other timestep's qparams, 7 to 9 times
    assert relative_error(q, steps) > 4 * calibrated


def test_unseen_floats_are_refused_on_request_with_both_neighbours():
    q, values, x = quantized("flow", "error"), sorted(scheduled("flow").timesteps.tolist()), noise(1)
    middle = [v < 500 for v in values].index(False)
    cases = [(500, *values[middle - 1 : middle + 1]), (993.5, *values[-2:])]
    for t, below, above in (*cases, (1200, values[-1], None), (0.5, None, values[0])):
        with pytest.raises(TFMQError) as error:
            q(x, t)
        assert f"timestep={float(t)}: not among the 50 calibrated timesteps" in str(error.value)
        assert f"its neighbours are {below} and {above}." in str(error.value)
    second = (
        r"timestep=981\.87\d*: .* neighbours are 978\.7\d+ and 986\.0\d+\."  # the first is in both schedules
    )
    with pytest.raises(TFMQError, match=second):
        trajectory(q, scheduled("flow", 20), x)
    trajectory(q, scheduled("flow"), x)  # the calibrated schedule passes


def test_an_unseen_float_beside_a_calibrated_one_is_told_apart():
    with pytest.raises(TFMQError, match=r"timestep=999\.99\d*: .* neighbours are 993\.12\d* and 1000"):
        quantized("flow", "error")(noise(1), 999.9999)


class Identity(nn.Module):
    def forward(self, timestep):
        return timestep


FLOATS, INTEGERS = st.floats(-2000, 2000, width=32), st.integers(-2000, 2000)
TABLES = [st.lists(values, min_size=1, max_size=20, unique=True) for values in (FLOATS, INTEGERS)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(table=st.one_of(TABLES), others=st.one_of(st.lists(FLOATS), st.lists(INTEGERS)))
@example(table=[100.0, 100.0001, 99.9999], others=[100.00005, 1e3])
@example(table=[5, -3, 900, 0], others=[449, 451, 5000])
def test_the_step_index_is_the_true_nearest_in_tables_of_any_order(table, others):
    gm = torch.fx.symbolic_trace(Identity())
    assert insert_step_index(gm, timesteps=torch.tensor(table), timestep="timestep").modified
    gm.graph.output_node().args = (step_index(gm),)
    gm.recompile()
    values = torch.tensor([*others, *table])
    indices = gm(values)
    assert indices[len(others) :].tolist() == list(range(len(table)))  # a value of the table finds itself
    distance = np.abs(torch.tensor(table).double().numpy() - values.double().numpy()[:, None])
    chosen = np.take_along_axis(distance, indices.numpy()[:, None], 1)[:, 0]
    assert (chosen == distance.min(1)).all()  # of two as near, either


@functools.cache
def integers():
    return tfmq_fx.quantize(make(TinyUNet), RECIPE, calibration=calibration())


FRACTION = (
    r"timestep=300\.5: the network was captured with integer timesteps; calibrate with the float schedule"
)


@torch.no_grad()
def test_fractional_timesteps_are_rounded_and_counted_by_a_network_captured_with_integers(caplog):
    """Euler's schedule for Stable Diffusion: 999, 908.18, ..."""
    q, x = integers(), noise(2)
    q.reset_unseen()
    for t in (300.4, torch.tensor(300.4), torch.tensor([300.4, 300.0])):
        assert torch.equal(q(x, t), q(x, 300))
    assert q.report["unseen_timesteps"] == {str(torch.tensor(300.4).item()): 3}
    assert "integer timesteps; it is rounded" in caplog.text
    assert torch.equal(q(x, torch.tensor([300.0, 100.0])), q(x, torch.tensor([300, 100])))
    q.reset_unseen()


@pytest.mark.parametrize(
    ("t", "words"),
    [
        (torch.tensor([300.0, 0.5]), r"timestep=0\.5: the network was captured with integer timesteps"),
        (float("inf"), "timestep=inf: is no timestep"),
        (1e30, "is no timestep"),
        (float("nan"), "timestep=nan: is no timestep"),
        ("300", "'300' is no number"),
    ],
)
def test_timesteps_of_no_schedule_of_integers_are_refused(t, words):
    with pytest.raises(TFMQError, match=words):
        integers()(noise(2), t)


def test_a_fractional_timestep_is_refused_on_request():
    q = tfmq_fx.quantize(
        make(TinyUNet), dataclasses.replace(RECIPE, unseen="error"), calibration=calibration()
    )
    with pytest.raises(TFMQError, match=FRACTION):
        q(noise(2), torch.tensor([300.0, 300.5]))


@pytest.mark.parametrize("name", ["flow", "quadratic"])
def test_repeated_timesteps_are_refused(name):
    values = quantized(name).timesteps
    with pytest.raises(TFMQError, match="timesteps: found repeated values; give each value once"):
        tfmq_fx.quantize(
            make(Growing), RECIPE, calibration=recorded(name), timesteps=torch.cat([values, values[3:4]])
        )


def test_fractional_data_for_a_schedule_of_integers_is_refused():
    whole = calibration().tensors
    data = tfmq_fx.CalibrationSet.from_tensors({**whole, "timestep": whole["timestep"] + 0.5})
    with pytest.raises(TFMQError, match="are in the data but not in the schedule"):
        tfmq_fx.quantize(make(TinyUNet), RECIPE, calibration=data, timesteps=whole["timestep"].unique())
