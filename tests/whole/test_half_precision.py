"""Half precision in, half precision out: the same integers, the network's dtype, errors bounded by its own."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, ddpm
from benchmarks.networks.small import (
    CALIBRATION,
    FAST,
    TinyUNet,
    Tokens,
    make,
)
from tests.helpers.lowered import lower
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.evaluation.sampling import sample

NEAREST = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=dataclasses.replace(FAST, method="nearest"))
LEARNED = dataclasses.replace(NEAREST, reconstruction=dataclasses.replace(FAST, tune_iterations=3))


def network(cls, dtype, *, through=None):
    """A network whose linears cast what they are given, as those do that embed the timestep in float32."""
    net = make(cls).to(through or dtype).to(dtype)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype),))
    return net


def data(cls, dtype):
    found = CALIBRATION[cls]()
    cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in found.tensors.items()}
    return tfmq_fx.CalibrationSet(cast, found.constants, found.timestep, found.paths)


def run(net, cls, dtype):
    with torch.no_grad():
        found = net(**data(cls, dtype).arguments(slice(0, 8)))
    found = found["sample"] if isinstance(found, dict) else found
    return found[0] if isinstance(found, tuple) else found


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@functools.cache
def quantized(cls, dtype, recipe=NEAREST, through=None):
    return tfmq_fx.quantize(network(cls, dtype, through=through), recipe, calibration=data(cls, dtype))


@pytest.mark.parametrize("cls", CALIBRATION)
def test_the_integers_are_those_of_the_same_weights_in_float32(cls):
    found = quantized(cls, torch.bfloat16).state_dict()
    expected = quantized(cls, torch.float32, NEAREST, torch.bfloat16).state_dict()
    weights = [n for n in expected if n.endswith(("weight_q", "weight_scale", "weight_zero_point"))]
    assert len(weights) > 10
    assert all(torch.equal(found[n], expected[n]) for n in weights)
    assert {x.dtype for n, x in found.items() if "scale" in n} == {torch.float32}


TWO_TERMS = dataclasses.replace(NEAREST, rules=(tfmq_fx.Rule(pattern="*.conv2*", activation_terms=2),))
CASES = [(cls, torch.bfloat16, NEAREST, 1.0) for cls in CALIBRATION] + [
    (TinyUNet, torch.float16, NEAREST, 1.0),
    (TinyUNet, torch.bfloat16, TWO_TERMS, 1.0),
    (Tokens, torch.bfloat16, LEARNED, 1.5),  # learned roundings end elsewhere, as with another seed
]


@pytest.mark.parametrize(("cls", "dtype", "recipe", "spread"), CASES)
def test_the_error_is_the_float_networks_and_half_precisions_own(cls, dtype, recipe, spread):
    exact = run(network(cls, torch.float32), cls, torch.float32)
    own = relative(run(network(cls, dtype), cls, dtype), exact)
    q = quantized(cls, dtype, recipe)
    rounded = torch.bfloat16 if recipe is NEAREST and dtype is torch.bfloat16 else None
    reference = quantized(cls, torch.float32, recipe, rounded)
    found = run(q, cls, dtype)
    assert found.dtype == q.dtype == dtype
    assert relative(found, exact) <= spread * relative(run(reference, cls, torch.float32), exact) + 2 * own


def test_a_half_precision_network_is_saved_loaded_lowered_and_exported(tmp_path):
    dtype = torch.bfloat16
    q = quantized(
        TinyUNet, dtype, dataclasses.replace(NEAREST, maintain="cache", cache_type="int8", keyed="all")
    )
    y = run(q, TinyUNet, dtype)
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    assert loaded.dtype == dtype
    assert torch.equal(run(loaded, TinyUNet, dtype), y)
    assert {x.dtype for n, x in loaded.state_dict().items() if n.endswith(".bias")} == {dtype}
    assert (
        tfmq_fx.QuantizedModel.from_pretrained(tmp_path / "q", torch_dtype=torch.float16).dtype
        == torch.float16
    )
    low = lower(q, engine="torch", compile=False, precision="float32")
    found = run(low, TinyUNet, dtype)
    assert found.dtype == low.dtype == dtype
    assert relative(found, y) < 0.03  # activations over a tie, as rounded in float32
    assert run(low.half(), TinyUNet, torch.float16).dtype == torch.float16
    q.export(tmp_path / "q.pt2")
    program = torch.export.load(tmp_path / "q.pt2").module()
    batch = data(TinyUNet, dtype).tensors
    with torch.no_grad():
        assert torch.equal(program(sample=batch["sample"][:8], timestep=batch["timestep"][:8]), y)


@pytest.mark.parametrize("name", ["flux", "sd"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_pipeline_in_half_precision_runs_unchanged(name, tmp_path):
    entry = next(e for e in PIPELINES if e.name == name)
    pipe = entry.make(tmp_path).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_samples": 2, "num_inference_steps": 2, **entry.arguments}
    calibration = tfmq_fx.CalibrationSet.record(pipe, **settings)
    q = tfmq_fx.quantize(pipe, NEAREST, calibration=calibration)
    assert bool(calibration.conditional.all()) != entry.guided
    exact, found = sample(pipe, None, **settings, seed=1), sample(pipe, q, **settings, seed=1)
    assert q.report["unseen_timesteps"] == {}
    assert found.isfinite().all()
    assert (found - exact).square().mean() < 0.02  # of values in [-1, 1]: random weights at 4 bit


def overflowing(net, layer):
    with torch.no_grad():
        net.get_submodule(layer).bias.fill_(6e4)
        net.get_submodule(layer).weight.abs_().mul_(1e4)
    return net


@pytest.mark.parametrize("smooth", [None, 0.5])
def test_an_overflow_in_float16_names_the_layer_and_bfloat16(smooth):
    recipe = dataclasses.replace(NEAREST, smooth=smooth)
    net = overflowing(network(TinyUNet, torch.float16), "down_block.conv1")
    with pytest.raises(
        TFMQError, match=r"values of .* overflow float16 in a batch .* load the network in bfloat16"
    ):
        tfmq_fx.quantize(net, recipe, calibration=data(TinyUNet, torch.float16))


def test_an_overflow_while_sampling_names_the_layer():
    pipe = ddpm().to(torch.float16)
    overflowing(pipe.unet, "mid_block.resnets.0.conv1")
    with pytest.raises(
        TFMQError, match=r"values of mid_block\.resnets\.0\.conv1 overflow float16 in call 1 of"
    ):
        tfmq_fx.CalibrationSet.record(pipe, num_samples=2, num_inference_steps=3)
