"""What calibrating refuses."""

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, calibration, captured
from tfmq_fx.base.errors import TFMQError

CalibrationSet = tfmq_fx.CalibrationSet


def test_timesteps_outside_the_schedule_are_refused():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=TIMESTEPS[:-1])
    with pytest.raises(
        TFMQError, match=r"timesteps \[0\] are in the data but not in the schedule of 9 values"
    ):
        tfmq_fx.calibrate(gm, calibration())


def test_a_missing_input_is_named():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    data = CalibrationSet.from_tensors({"smple": torch.zeros(10, 1, 8, 8), "timestep": TIMESTEPS})
    with pytest.raises(TFMQError, match="the graph's input 'sample' is missing"):
        tfmq_fx.calibrate(gm, data)
