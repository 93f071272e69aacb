import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, calibration, captured
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.demo import embedded_pipeline

CalibrationSet = tfmq_fx.CalibrationSet


def test_recording_keeps_one_trajectory_per_sample():
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    data = CalibrationSet.record(pipe, num_samples=5, num_inference_steps=4, seed=3, batch_size=2)
    assert len(data) == 20
    assert data.timesteps.tolist() == [750, 500, 250, 0]
    assert data.tensors["sample"].shape == (20, 1, 16, 16)
    again = CalibrationSet.record(pipe, num_samples=5, num_inference_steps=4, seed=3, batch_size=2)
    assert torch.equal(again.tensors["sample"], data.tensors["sample"])
    assert not pipe.unet._forward_pre_hooks


def test_spread_takes_rows_evenly_over_timesteps():
    data = calibration(100)
    few = data.spread(30, seed=1)
    assert torch.unique(few.tensors["timestep"], return_counts=True)[1].tolist() == [3] * 10
    assert len(data.spread(1000)) == 100


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"sample": torch.zeros(0, 3), "timestep": torch.zeros(0)}, "the set is empty"),
        ({"sample": torch.zeros(2, 3), "timestep": torch.zeros(3)}, "different numbers of rows"),
        (
            {"sample": torch.tensor([[0.0], [torch.nan]]), "timestep": torch.zeros(2)},
            "'sample' holds NaN .*first in row 1",
        ),
        ({"sample": torch.zeros(2, 3), "t": torch.zeros(2)}, "no tensor named 'timestep'; found"),
    ],
)
def test_bad_sets_are_refused(tensors, words):
    with pytest.raises(TFMQError, match=words):
        CalibrationSet.from_tensors(tensors)


def test_recording_nothing_is_refused():
    with pytest.raises(TFMQError, match="must be positive"):
        CalibrationSet.record(embedded_pipeline(), num_samples=0, num_inference_steps=4)


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
