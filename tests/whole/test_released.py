"""What is no longer needed is no longer held: float weights, observers, graphs on the way."""

import dataclasses
import gc
import weakref

import pytest
import torch

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES
from benchmarks.networks.small import CALIBRATION, FAST, Labelled, TinyUNet, Tokens, make
from tfmq_fx.base._torchao import FakeQuantizeBase, ObserverBase
from tfmq_fx.reconstruction.gptq import Moments, gptq

OBSERVERS = (FakeQuantizeBase, ObserverBase)
NEAREST = dataclasses.replace(FAST, method="nearest")
CASES = {
    "default": (TinyUNet, {}),
    "gptq": (TinyUNet, {"reconstruction": dataclasses.replace(FAST, method="gptq")}),
    "tuned": (TinyUNet, {"reconstruction": dataclasses.replace(NEAREST, tune_iterations=2)}),
    "cached": (Labelled, {"maintain": "cache"}),
    "chosen": (Labelled, {"maintain": "auto", "smooth": "auto", "keyed": "auto", "double_flops": 0.1}),
    "rewritten": (Tokens, {"smooth": 0.5, "rotate": 4, "low_rank": 2}),
}


def alive(references):
    gc.collect()
    return [name for name, x in references.items() if x() is not None]


def count(*classes):
    return sum(issubclass(type(o), classes) for o in gc.get_objects())


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_network_holds_no_float_weight_that_it_does_not_compute_with(name):
    cls, changes = CASES[name]
    recipe = dataclasses.replace(tfmq_fx.Recipe(), **{"reconstruction": NEAREST, **changes})
    network = make(cls)
    weights = {n: weakref.ref(p) for n, p in network.named_parameters()}
    before = count(*OBSERVERS)
    q = tfmq_fx.quantize(network, recipe, calibration=CALIBRATION[cls]())
    layers = {layer["path"] for layer in q.report["layers"]}
    del network
    assert not layers.intersection(alive(weights))
    assert count(*OBSERVERS) <= before
    del q
    assert not alive(weights)


def test_a_quantized_pipeline_holds_no_float_weight(tmp_path):
    torch.manual_seed(0)
    entry = next(e for e in PIPELINES if e.name == "sd")
    pipe = entry.make(tmp_path / "files")
    pipe.set_progress_bar_config(disable=True)
    weights = {n: weakref.ref(p) for n, p in pipe.unet.named_parameters()}
    data = tfmq_fx.CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2, **entry.arguments)
    recipe = dataclasses.replace(tfmq_fx.Recipe.preset("w8a8"), reconstruction=NEAREST)
    q = tfmq_fx.quantize(pipe, recipe, calibration=data)
    layers = {layer["path"] for layer in q.report["layers"]}
    del pipe
    assert not layers.intersection(alive(weights))


@pytest.mark.parametrize("how", ["openvino", "torch", "saved"])
def test_what_is_made_of_a_quantized_network_does_not_hold_it(how, tmp_path):
    recipe = tfmq_fx.Recipe(reconstruction=NEAREST)
    q = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=CALIBRATION[TinyUNet]())
    held = {"network": weakref.ref(q), "graph": weakref.ref(q.network)}
    if how == "saved":
        q.save_pretrained(tmp_path / "q")
        made = tfmq_fx.load(tmp_path / "q")
    else:
        made = q.lower("cpu", engine=how, compile=False) if how == "torch" else q.lower("cpu", engine=how)
    given = CALIBRATION[TinyUNet]().tensors["sample"][:2]
    del q
    assert not alive(held)
    with torch.no_grad():
        assert made(given, 300).isfinite().all()


def test_blocks_leave_nothing_to_the_garbage_collector():
    """A GPU's memory that only a cycle of references holds is held until Python happens to collect it."""
    x = torch.randn(1, 50, 40, generator=torch.Generator().manual_seed(0))
    moments = Moments(1, 40)
    moments.add(x)
    w = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(1))
    scale, zero_point = torch.full((1, 8, 1), 0.1), torch.zeros(1, 8, 1)
    numbers = tfmq_fx.base.arithmetic.IntegerRange.weight(4)
    gc.collect()
    gc.disable()
    try:
        before = count(torch.Tensor)
        gptq(w, moments, scale, zero_point, numbers)
        moments._factors.clear()
        after = count(torch.Tensor)
    finally:
        gc.enable()
    assert after == before
