"""Sets of calibration rows."""

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import calibration
from tfmq_fx.base.errors import TFMQError

CalibrationSet = tfmq_fx.CalibrationSet


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
        (
            {"sample": torch.zeros(2, 3), "t": torch.zeros(2)},
            "no tensor named 'timestep'; found .* Name the timestep with timestep=",
        ),
        # A series of observations has a time axis of its own, which may bear the name.
        (
            {
                "sample": torch.zeros(4, 3),
                "timestep": torch.arange(12.0).reshape(4, 3),
                "step": torch.arange(4),
            },
            r"'timestep' has 3 values per row, all different: that is data, .* \(step could be it\)",
        ),
        (
            {"sample": torch.zeros(4, 3), "timestep": torch.arange(3.0).expand(4, 3)},
            "'timestep' has 3 values per row, the same in every row: that is data",
        ),
    ],
)
def test_bad_sets_are_refused(tensors, words):
    with pytest.raises(TFMQError, match=words):
        CalibrationSet.from_tensors(tensors)


def test_a_part_of_a_set_may_have_the_rows_of_one_step():
    """Frames of a video with a timestep each: those of one step of the sampler are the same in every row."""
    t = torch.tensor([900.0, 600, 300]).repeat(2)[:, None].expand(6, 3).clone()
    t[:, 0] = 0
    data = CalibrationSet.from_tensors({"sample": torch.randn(6, 3, 2), "timestep": t})
    assert data.rows(data.row_timesteps == 600).tensors["timestep"].tolist() == [[0, 600, 600]] * 2


def test_a_set_shows_its_rows_and_says_what_is_no_row():
    data = calibration()
    assert repr(data).startswith("CalibrationSet(40 rows at ")
    with pytest.raises(TFMQError, match="num_samples=-1 must be positive"):
        data.spread(-1)
    with pytest.raises(TFMQError, match="'timestep' is a single number; give one for each row"):
        tfmq_fx.CalibrationSet.from_tensors({"sample": torch.zeros(3, 1), "timestep": torch.tensor(3)})
