import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, calibration, captured
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.observers import (
    TemporalKLObserver,
    TemporalMinMaxObserver,
    TemporalMSEObserver,
    TemporalObserver,
    TemporalPercentileObserver,
)

ESTIMATORS = [TemporalMinMaxObserver, TemporalMSEObserver, TemporalKLObserver, TemporalPercentileObserver]


def observed(cls, *parts, num_keys=4):
    observer = cls(num_keys=num_keys)
    observer.disable_fake_quant()
    for x, step in parts:
        observer(x, step)
    return observer


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(ESTIMATORS), st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5))
@example(TemporalKLObserver, 536, 1, 4)  # a timestep whose values have no width
def test_observing_parts_equals_observing_the_whole(cls, seed, first, second):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 + first + second, 6, generator=generator)
    step = torch.cat([torch.arange(4), torch.randint(0, 4, (first + second,), generator=generator)])
    cut = 4 + first
    parts = observed(cls, (x[:cut], step[:cut]), (x[cut:], step[cut:])).calculate_qparams()
    whole = observed(cls, (x, step)).calculate_qparams()
    backwards = observed(cls, (x[cut:], step[cut:]), (x[:cut], step[:cut])).calculate_qparams()
    for a, b, c in zip(parts, whole, backwards, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_each_sample_takes_the_qparams_of_its_own_timestep(cls):
    x = torch.randn(4, 32) * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    observer = observed(cls, (x, torch.arange(4)))
    observer.freeze()
    mixed = torch.tensor([3, 0, 2, 1, 0])
    together = observer(x[mixed], mixed)
    alone = torch.cat([observer(x[i : i + 1], torch.tensor([i])) for i in mixed.tolist()])
    assert torch.equal(together, alone)
    # One step of a row's own 8-bit grid: the scales differ 1000 times, so a foreign scale would show.
    assert ((together - x[mixed]).abs().amax(1) <= x[mixed].abs().amax(1) / 30).all()


def test_minmax_covers_the_range_to_half_a_step():
    x = torch.randn(4, 64)
    observer = observed(TemporalMinMaxObserver, (x, torch.arange(4)))
    observer.freeze()
    y = observer(x, torch.arange(4))
    assert ((y - x).abs() <= observer.scale[:, None] * 0.5001).all()


def test_a_timestep_never_observed_is_refused():
    observer = observed(TemporalMinMaxObserver, (torch.randn(2, 3), torch.tensor([0, 2])))
    with pytest.raises(
        TFMQError,
        match=r"2 of 4 timesteps \(or keys with them\) were never observed \(step indices \[1, 3\]\)",
    ):
        observer.calculate_qparams()


class MeanAbsObserver(TemporalObserver):
    """A third party's estimator: the range is four mean absolute values."""

    def __init__(self, *, num_keys, **kwargs):
        super().__init__(num_keys=num_keys, **kwargs)
        self.total, self.count = torch.zeros(num_keys), torch.zeros(num_keys)

    def observe(self, x_NF, step_N):
        self.total.index_add_(0, step_N, x_NF.abs().mean(1))
        self.count.index_add_(0, step_N, torch.ones(len(step_N)))

    def ranges(self):
        high = 4 * self.total / self.count
        return -high, high


def test_a_third_party_observer_works_by_subclassing_the_base():
    recipe = tfmq_fx.Recipe(temporal_observer=MeanAbsObserver)
    gm = tfmq_fx.prepare(captured(), recipe, timesteps=TIMESTEPS)
    used = [m for m in gm.modules() if isinstance(m, MeanAbsObserver)]
    assert len(used) == 4  # two layers of the time MLP, two embedding layers
    tfmq_fx.calibrate(gm, calibration())
    batch = calibration().tensors
    with torch.no_grad():
        expected = gm(batch["sample"], batch["timestep"])
        assert torch.equal(tfmq_fx.convert(gm)(batch["sample"], batch["timestep"]), expected)
    assert recipe.to_json()["temporal_observer"].endswith("MeanAbsObserver")


def test_kl_clips_lone_outliers_and_keeps_what_is_even():
    generator = torch.Generator().manual_seed(0)
    bell = torch.randn(1, 20000, generator=generator)
    bell[0, :2] = torch.tensor([-12.0, 12.0])
    even = torch.rand(1, 20000, generator=generator) * 8 - 4
    data = (bell, torch.tensor([0])), (even, torch.tensor([1]))
    low, high = observed(TemporalKLObserver, *data, num_keys=2).ranges()
    assert -5 < low[0] < -3.5
    assert 3.5 < high[0] < 5  # the bulk ends at 4.3
    assert (low[1], high[1]) == (even.min(), even.max())
