"""Pipelines whose denoiser comes from `precompute`: the pictures, in other schedules too, and what diffusers reads again."""

import diffusers
import pytest
import torch

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, saved
from tfmq_fx.calibration.pipelines import denoiser
from tfmq_fx.evaluation.sampling import sample

ENTRIES = {e.name: e for e in PIPELINES}
STEPS = 4
pytestmark = [
    # diffusers' own, on this torch and numpy.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


@pytest.mark.parametrize(
    "name", [n if n == "sd3" else pytest.param(n, marks=pytest.mark.slow) for n in ENTRIES]
)
def test_the_pictures_are_the_float_ones(name, tmp_path):
    entry = ENTRIES[name]
    pipe = saved(entry, tmp_path)
    float_network = denoiser(pipe)
    (component,) = [n for n, m in pipe.components.items() if m is float_network]
    model = tfmq_fx.precompute(pipe, num_inference_steps=STEPS, finite=entry.finite, **entry.arguments)
    assert {f["chosen"] for f in model.report["maintenance"]["features"]} & {"table", "request"}

    def pictures(network, steps):
        return sample(pipe, network, num_samples=3, num_inference_steps=steps, seed=1, **entry.arguments)

    for steps in (STEPS, 3):  # the second has timesteps that are in no table
        # Roundings of the features of a request, which four steps of a random network enlarge.
        torch.testing.assert_close(pictures(model, steps), pictures(None, steps), rtol=0, atol=1e-3)
    setattr(pipe, component, model)
    pipe.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert isinstance(getattr(again, component), tfmq_fx.PrecomputedModel)
    direct = type(float_network).from_pretrained(tmp_path / "again", subfolder=component)
    assert torch.equal(pictures(direct, STEPS), pictures(model, STEPS))
