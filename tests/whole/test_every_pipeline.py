"""The table of all pipeline classes, and pipelines with two denoisers."""

from pathlib import Path

import diffusers
import pytest
import torch

import tfmq_fx
from benchmarks.networks.components import arguments, make
from benchmarks.pipelines import NEAREST, classes, read, table, try_class
from tfmq_fx.calibration.data import CalibrationSet

PAGE = Path(__file__).parents[2] / "docs" / "measured" / "pipelines.md"
pytestmark = [
    # diffusers' own, on this torch and numpy.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def test_the_page_shows_the_committed_rows():
    rows = read()
    assert len(rows) >= 70
    assert all(row.get("reason") or row.get("saves") for row in rows.values())
    assert table(rows) in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ChromaPipeline", "AnimateDiffPipeline", "Kandinsky5T2VPipeline", "FluxControlNetPipeline"]
)
def test_pipelines_that_once_failed(name):
    assert try_class(name, classes()[name])["saves"]


@pytest.mark.slow
def test_each_of_two_denoisers_has_its_own_part_of_the_schedule(tmp_path):
    torch.manual_seed(0)
    pipe = make(diffusers.WanPipeline, tmp_path)
    given = {**arguments(pipe), "num_inference_steps": 6}
    found = {}
    for name in ("transformer", "transformer_2"):
        data = CalibrationSet.record(pipe, num_samples=2, component=name, **given)
        found[name] = tfmq_fx.quantize(getattr(pipe, name), NEAREST, calibration=data)
    high, low = (q.timesteps.tolist() for q in found.values())
    assert min(high) >= 900 > max(low)  # the boundary is at 0.9 of 1000
    assert sorted([*high, *low], reverse=True) == pipe.scheduler.timesteps.tolist()
    for name, q in found.items():
        setattr(pipe, name, q)
    assert pipe(**given, output_type="np").frames.shape == (1, 5, 16, 16, 3)
    assert all(q.report["unseen_timesteps"] == {} for q in found.values())
