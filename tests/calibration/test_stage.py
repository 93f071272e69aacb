"""What calibrating refuses."""

import dataclasses

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, TinyUNet, calibration, captured, make
from tests.helpers.nearest import recipe
from tfmq_fx.base.errors import TFMQError

CalibrationSet = tfmq_fx.CalibrationSet


def test_timesteps_outside_the_schedule_are_refused():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=TIMESTEPS[:-1])
    with pytest.raises(
        TFMQError, match=r"timesteps \[0\] are in the data but not in the schedule of 9 values"
    ):
        tfmq_fx.calibrate(gm, calibration())


def test_timesteps_of_the_schedule_without_rows_are_refused_before_anything_is_observed():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(keyed="all"), timesteps=[*TIMESTEPS.tolist(), 5])
    gm.forward = None  # it must not run
    with pytest.raises(TFMQError, match="no row has the timesteps 5 of the schedule"):
        tfmq_fx.calibrate(gm, calibration())


def test_a_missing_input_is_named():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    data = CalibrationSet.from_tensors({"smple": torch.zeros(10, 1, 8, 8), "timestep": TIMESTEPS})
    with pytest.raises(TFMQError, match="the graph's input 'sample' is missing"):
        tfmq_fx.calibrate(gm, data)


class Absent(TinyUNet):
    """A layer of what comes before the last eight rows: of nothing."""

    def __init__(self):
        super().__init__()
        self.of_none = torch.nn.Linear(8, 8)

    def forward(self, sample, timestep):
        rest = self.of_none(sample[:, :, : sample.shape[2] - 8])
        return super().forward(torch.cat([rest, sample[:, :, -8:]], 2), timestep)


@pytest.mark.parametrize("open_", [True, False])
def test_a_layer_of_nothing_is_named_and_can_stay_in_float(open_):
    more = {"smooth": "auto", "keyed": "auto"} if open_ else {}
    one = dataclasses.replace(recipe("w8a8"), **more)
    with pytest.raises(TFMQError, match=r"the input of of_none\.weight is empty in all calibration data"):
        tfmq_fx.quantize(make(Absent), one, calibration=calibration())
    rule = tfmq_fx.Rule(pattern="of_none.weight", activation_bits=16)
    q = tfmq_fx.quantize(make(Absent), dataclasses.replace(one, rules=(rule,)), calibration=calibration())
    x, t = calibration().tensors["sample"], calibration().tensors["timestep"]
    with torch.no_grad():
        expected = make(Absent)(x, t)
    assert (q(x, t) - expected).norm() / expected.norm() < 0.07  # as in tests/whole/test_moving_sizes.py


class Joined(TinyUNet):
    """Beside the first layer, one that reads a constant, and one that reads floats joined with integers."""

    def __init__(self):
        super().__init__()
        self.of_constant, self.of_both = torch.nn.Linear(2, 1), torch.nn.Conv2d(2, 1, 1)

    def forward(self, sample, timestep):
        numbers = torch.zeros_like(sample, dtype=torch.long) + torch.arange(sample.shape[-1])
        sample = self.of_both(torch.cat([sample, numbers], 1))
        return super().forward(sample + self.of_constant(torch.full((2,), 3.0)), timestep)


def test_constant_inputs_and_integers_among_floats_are_noted_and_finite():
    q = tfmq_fx.quantize(make(Joined), recipe("w4a8"), calibration=calibration())
    notes = {n["name"]: n["reason"] for n in q.report["notes"]}
    assert notes["of_constant.weight"].startswith("its input is 3 in all calibration data")
    assert any("joins float32 and int64" in reason for reason in notes.values())
    assert all(x.isfinite().all() for x in q.state_dict().values() if x.is_floating_point())
