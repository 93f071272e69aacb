"""Networks that do not fit on the device that computes: all stages, with weights that lie elsewhere."""

import dataclasses
import gc
import weakref
from collections import Counter

import pytest
import torch
from torch._subclasses import FakeTensor

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES
from benchmarks.networks.small import CALIBRATION, FAST, Deep, Labelled, TinyUNet, calibration, make
from tests.helpers.elsewhere import DEVICE, Elsewhere, device
from tests.helpers.precomputed import Half, Wide, precomputed
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.bit_widths import mixed_precision
from tfmq_fx.calibration.data import CalibrationSet

LEARNED = dataclasses.replace(FAST, iterations=3, temporal_iterations=3, tune_iterations=3, shards=1)
FINITE = {"class_labels": range(Labelled.classes)}
CASES = {
    "adaround": ({}, {}),
    "gptq": ({}, {"method": "gptq", "temporal_method": "gptq", "tune_iterations": 0}),
    "both, in groups": ({"group_size": 8, "keyed": "all"}, {"method": "gptq+adaround"}),
    "on disk": ({"maintain": "cache"}, {"method": "nearest", "max_memory": 1e-6, "tune_iterations": 0}),
    "chosen": (
        {"smooth": "auto", "keyed": "auto", "double_flops": 0.1, "float_bytes": 0.1, "maintain": "auto"},
        {"method": "nearest", "tune_iterations": 0},
    ),
    "float outside the table": (
        {"unseen": "float", "attention_bits": 8},
        {"method": "nearest", "tune_iterations": 0},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a stand-in for a device is one of this thread
    yield
    torch.set_num_threads(threads)


def both(network, recipe, data, **settings):
    """Return the network quantized where it lies, and by computing elsewhere."""
    here = tfmq_fx.quantize(network, recipe, calibration=data, **settings)
    with device():
        return here, tfmq_fx.quantize(network, recipe, calibration=data, execution_device=DEVICE, **settings)


def require_same(here, there, *, steps=0):
    expected, found = tensors_of(here.network), tensors_of(there.network)
    assert expected.keys() == found.keys()
    assert {type(x) for x in found.values()} <= {torch.Tensor, torch.nn.Parameter}
    for name, x in found.items():
        if x.is_floating_point():
            torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=1e-5)
        else:
            assert (x.int() - expected[name].int()).abs().max() <= steps, name


@pytest.mark.parametrize("name", CASES)
def test_the_integers_are_the_same(name):
    changes, how = CASES[name]
    recipe = dataclasses.replace(
        tfmq_fx.Recipe(), **changes, reconstruction=dataclasses.replace(LEARNED, **how)
    )
    network, data = make(Labelled), CALIBRATION[Labelled]()
    before = dict(network.named_parameters())
    here, there = both(network, recipe, data, finite=FINITE)
    require_same(here, there)
    assert all(p is before[n] for n, p in network.named_parameters())
    assert there.device == torch.device("cpu")
    given = data.arguments(slice(0, 4))
    with torch.no_grad():
        assert torch.equal(here(**given), there(**given))
    for a, b in zip(there.report["errors_by_timestep"], here.report["errors_by_timestep"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rewritten_weights_and_half_precision(dtype):
    recipe = dataclasses.replace(
        tfmq_fx.Recipe.preset("w4a4"),
        smooth=0.5, rotate=4, low_rank=2,
        reconstruction=dataclasses.replace(LEARNED, method="nearest", tune_iterations=0, max_memory=1e-6),
    )  # fmt: skip
    data = calibration()
    data = CalibrationSet.from_tensors({**data.tensors, "sample": data.tensors["sample"].to(dtype)})
    here, there = both(make(Half).to(dtype), recipe, data)
    # Attention has another kernel there: the largest inputs, by which weights are smoothed, differ in their last bits.
    if dtype == torch.float32:
        require_same(here, there, steps=1)
    assert there.dtype == dtype
    given = data.arguments(slice(0, 8))
    with torch.no_grad():
        x, y = there(**given).float(), here(**given).float()
    # A smoothed weight on the other side of a tie is 1/15 of its range away, at 4 bits.
    assert (x - y).norm() < 0.05 * y.norm()


class Held:
    """The most bytes that the device held at once."""

    def __init__(self, monkeypatch):
        self.now, self.most, self.readers = 0, 0, Counter()
        own = Elsewhere.__init__

        def counted(x, values, requires_grad=False):
            own(x, values, requires_grad)
            if isinstance(values, FakeTensor):
                return
            storage = values.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            self.readers[key] += 1
            if self.readers[key] == 1:
                self.now += size
                self.most = max(self.most, self.now)
            weakref.finalize(x, self.freed, key, size)

        monkeypatch.setattr(Elsewhere, "__init__", counted)

    def freed(self, key, size):
        self.readers[key] -= 1
        if not self.readers[key]:
            self.now -= size


@pytest.mark.parametrize("preset", ["", "w4a8"])
def test_what_the_device_holds_does_not_grow_with_the_network(preset):
    data = CalibrationSet.from_tensors(
        {"sample": torch.randn(8, 128), "timestep": torch.arange(0, 1000, 250).flip(0).repeat(2)}
    )
    how = dataclasses.replace(LEARNED, method="gptq", tune_iterations=0, batch_size=4)
    recipe = tfmq_fx.Recipe.preset(preset) if preset else tfmq_fx.Recipe()
    recipe = dataclasses.replace(recipe, reconstruction=how)
    sizes, most = [], []
    torch.manual_seed(0)
    for layers in (4, 12):
        network = Deep(width=128, layers=layers).eval()
        sizes.append(sum(p.nbytes for p in network.parameters()))
        with pytest.MonkeyPatch.context() as patch, device():
            held = Held(patch)
            q = tfmq_fx.quantize(network, recipe, calibration=data, execution_device=DEVICE)
            gc.collect()
        most.append(held.most)
        assert q.report["layers"]
        assert held.now < 0.02 * sizes[-1]
    # Vectors and histograms of activations, 10 kB a layer, are held; its 130 kB of weights are not.
    assert most[1] - most[0] < 0.2 * (sizes[1] - sizes[0])


@pytest.mark.parametrize(
    "entry", [e for e in PIPELINES if e.name in ("dit", "sd", "flux")], ids=lambda e: e.name
)
def test_pipelines_are_recorded_there(entry, tmp_path):
    torch.manual_seed(0)
    pipe = entry.make(tmp_path / "files")
    pipe.set_progress_bar_config(disable=True)
    how = {"num_samples": 2, "num_inference_steps": 2, **entry.arguments}
    expected = CalibrationSet.record(pipe, **how)
    with device():
        found = CalibrationSet.record(pipe, execution_device=DEVICE, **how)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, x in expected.tensors.items():
        assert type(found.tensors[name]) is torch.Tensor
        torch.testing.assert_close(found.tensors[name], x, rtol=1e-3, atol=1e-3)
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    assert {type(p) for m in modules for p in m.parameters()} == {torch.nn.Parameter}
    assert not any(m._forward_pre_hooks for m in modules)


def test_a_precomputed_network_and_bit_widths():
    recipe = tfmq_fx.Recipe(reconstruction=dataclasses.replace(LEARNED, method="nearest", tune_iterations=0))
    data = calibration()
    more = torch.linspace(1, 4, len(data.tensors["sample"]))
    here, there = both(
        precomputed(Wide), recipe, CalibrationSet.from_tensors({**data.tensors, "guidance": more})
    )
    require_same(here, there)
    assert there.outside.device == torch.device("cpu")
    network = make(TinyUNet)
    expected = mixed_precision(network, recipe, calibration=data, max_bytes=5000, rows=8)
    with device():
        found = mixed_precision(
            network, recipe, calibration=data, max_bytes=5000, rows=8, execution_device=DEVICE
        )
    assert found == expected


def test_an_interrupted_run_goes_on_there(tmp_path):
    recipe = tfmq_fx.Recipe(reconstruction=dataclasses.replace(LEARNED, method="gptq", tune_iterations=0))
    data = calibration()
    with device():
        first = tfmq_fx.quantize(
            make(TinyUNet), recipe, calibration=data, state=tmp_path / "s", execution_device=DEVICE
        )
        again = tfmq_fx.quantize(
            make(TinyUNet), recipe, calibration=data, state=tmp_path / "s", execution_device=DEVICE
        )
    require_same(first, again)


def test_a_device_that_does_not_exist_is_refused_before_anything_runs():
    calls = []
    network = make(TinyUNet)
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(TFMQError, match="execution_device cuda:77: cannot be used here"):
        tfmq_fx.quantize(network, calibration=calibration(), execution_device="cuda:77")
    assert not calls
