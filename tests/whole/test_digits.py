"""End to end on the embedded model: real trajectories, real pictures."""

import json

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

import tfmq_fx
from benchmarks.networks.pipelines import ddpm
from benchmarks.networks.small import ScalarTime, make
from tfmq_fx.base.metrics import cosine_distance, psnr, psnr_by_image
from tfmq_fx.calibration.temporal_rows import run_temporal
from tfmq_fx.demo import FOLDER
from tfmq_fx.evaluation.sampling import sample
from tfmq_fx.passes import extract_temporal, find_temporal
from tfmq_fx.passes.quantize.state import temporal_of

STEPS = {"num_inference_steps": 10, "num_samples": 16, "seed": 5}


def test_the_shipped_weights_are_small_and_in_diffusers_format():
    weights = FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 8e6
    assert json.loads((FOLDER / "unet" / "config.json").read_text())["_class_name"] == "UNet2DModel"


def test_quantized_samples_are_close_to_float(pipe, digits):
    y, reference = sample(pipe, digits, **STEPS), sample(pipe, **STEPS)
    # The bound of the full recipe is 32 dB (benchmarks/quality.py); this is a few iterations on ten steps.
    assert psnr_by_image(y, reference).mean() > 26
    assert psnr(y, reference) < 80  # it is quantized, not the float network


def test_the_artefact_is_small_and_samples_the_same_bits(pipe, digits, tmp_path):
    digits.save_pretrained(tmp_path / "q")
    size = (tmp_path / "q" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size <= 0.16 * (FOLDER / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert torch.equal(sample(pipe, tfmq_fx.load(tmp_path / "q"), **STEPS), sample(pipe, digits, **STEPS))


def test_the_report_counts_every_convolution_and_linear(pipe, digits):
    unet = pipe.unet
    modules = {
        f"{n}.weight" for n, m in unet.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    }
    layers = {layer["path"]: layer for layer in digits.report["layers"]}
    assert layers.keys() == modules
    eight = {path for path, layer in layers.items() if layer["weight_bits"] == 8}
    assert eight == {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"}
    assert {layer["weight_bits"] for path, layer in layers.items() if path not in eight} == {4}


def test_temporal_features_stay_close(pipe, digits):
    example = {"sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor([0, 500]), "return_dict": False}
    gm = tfmq_fx.capture(pipe.unet, example)
    data = tfmq_fx.CalibrationSet.from_tensors(
        {"sample": torch.randn(10, 1, 16, 16), "timestep": digits.timesteps}
    )
    rows = {"timestep": digits.timesteps}
    with torch.no_grad():
        features = run_temporal(extract_temporal(gm, find_temporal(gm)), rows)
        distance = cosine_distance(run_temporal(digits.temporal_block, rows), features)
    assert distance.shape == (11, 10)
    nearest = tfmq_fx.calibrate(tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=digits.timesteps), data)
    with torch.no_grad():
        rough = cosine_distance(run_temporal(extract_temporal(nearest, temporal_of(nearest)), rows), features)
    assert distance.max() <= 0.5 * rough.max()
    assert rough.max() <= 1e-2


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)]
)
def test_it_is_a_drop_in_for_the_pipelines(pipe, digits, pipeline, scheduler):
    config = pipe.scheduler.config
    fresh = pipeline(pipe.unet, scheduler.from_config(config))
    fresh.set_progress_bar_config(disable=True)
    run = {"batch_size": 2, "num_inference_steps": 10, "output_type": "np"}
    expected = fresh(generator=torch.Generator().manual_seed(0), **run).images
    fresh.unet = digits
    got = fresh(generator=torch.Generator().manual_seed(0), **run).images
    assert got.shape == expected.shape
    assert not (got == expected).all()
    assert type(digits(torch.randn(2, 1, 16, 16), 0)) is type(pipe.unet(torch.randn(2, 1, 16, 16), 0))
    assert digits.config.in_channels == pipe.unet.config.in_channels
    assert (digits.dtype, digits.device) == (pipe.unet.dtype, pipe.unet.device)


def test_the_same_seed_gives_the_same_artefact(tmp_path):
    pipe = ddpm()
    pipe.set_progress_bar_config(disable=True)
    quick = tfmq_fx.Reconstruction(iterations=4, num_samples=16, tune_iterations=2)
    written = []
    for name in ("a", "b"):
        data = tfmq_fx.CalibrationSet.record(pipe, num_samples=4, num_inference_steps=5, seed=0)
        q = tfmq_fx.quantize(pipe, tfmq_fx.Recipe(reconstruction=quick), calibration=data, seed=0)
        q.save_pretrained(tmp_path / name)
        written.append((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes())
    assert written[0] == written[1]


class OutputOfDiffusers(ScalarTime):
    """To trace a UNet2DModel takes half a minute and more."""

    def forward(self, sample, timestep, return_dict: bool = True):
        y = super().forward(sample, timestep)
        return UNet2DOutput(sample=y) if return_dict else (y,)


def test_it_compiles_with_the_float_networks_output_class():
    x, t = torch.randn(3, 4), torch.tensor([0, 900, 450])
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": t})
    nearest = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    q = tfmq_fx.quantize(make(OutputOfDiffusers), nearest, calibration=data)
    torch._dynamo.reset()
    compiled = torch.compile(q, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        y = compiled(x, t)
        assert type(y) is UNet2DOutput
        torch.testing.assert_close(y.sample, q(x, t).sample)
        torch.testing.assert_close(compiled(x, t, return_dict=False)[0], q(x, t).sample)


def test_an_artefact_cannot_name_any_class_as_its_output(digits, tmp_path):
    digits.save_pretrained(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["quantization_config"]["sha256"]["config.json"]  # as whoever forges it would
    for name in ("os.system", "diffusers.DiffusionPipeline"):
        config["quantization_config"]["interface"]["output_type"] = name
        (tmp_path / "q" / "config.json").write_text(json.dumps(config))
        with pytest.raises(tfmq_fx.TFMQError, match=f"output type '{name}' is not a diffusers"):
            tfmq_fx.load(tmp_path / "q")
