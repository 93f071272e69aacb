"""torch's settings around a public call do not change what it computes."""

import dataclasses

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, TinyUNet, calibration, make
from tests.helpers.lowered import lower
from tests.helpers.settings import EACH, SETTINGS
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.base.errors import TFMQError

RECIPE = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=FAST)
X, T = calibration().tensors["sample"][:4], torch.tensor([300, 0, 900, 500])
BY_HAND = dataclasses.replace(RECIPE, maintain="auto")


def by_hand(network, data):
    gm = tfmq_fx.capture(network, {"sample": X, "timestep": T})
    gm = tfmq_fx.prepare(gm, BY_HAND, timesteps=TIMESTEPS)
    gm = tfmq_fx.calibrate(gm, data)
    layers = tfmq_fx.sensitivity(gm, data, rows=20).layers
    gm = tfmq_fx.reconstruct(gm, data)
    return tfmq_fx.convert(tfmq_fx.maintain(gm, data)), layers


@pytest.fixture(scope="module")
def plain():
    return by_hand(make(TinyUNet), calibration())


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("setting", EACH)
def test_quantize_gives_the_same_network(setting, tiny):
    network, data = make(TinyUNet), calibration()
    with setting():
        q = tfmq_fx.quantize(network, RECIPE, calibration=data, seed=0)
    assert_equal(tensors_of(q.network), tensors_of(tiny.network))
    assert str(q.network.graph) == str(tiny.network.graph)
    assert q.report["errors_by_timestep"] == tiny.report["errors_by_timestep"]


@pytest.mark.parametrize("setting", EACH)
def test_the_stages_give_the_same_network(setting, plain):
    network, data = make(TinyUNet), calibration()
    with setting():
        gm, layers = by_hand(network, data)
    assert_equal(tensors_of(gm), tensors_of(plain[0]))
    assert layers == plain[1]


@pytest.mark.parametrize("setting", EACH)
def test_saving_and_loading_give_the_same_network(setting, tiny, tmp_path):
    with setting():
        tiny.save_pretrained(tmp_path / "q")
        loaded = tfmq_fx.load(tmp_path / "q")
    assert_equal(tensors_of(loaded.network), tensors_of(tiny.network))
    with torch.no_grad():
        assert torch.equal(loaded(X, T), tiny(X, T))


@pytest.mark.parametrize("setting", EACH)
def test_export_writes_the_same_program(setting, tiny, tmp_path):
    with setting():
        tiny.export(tmp_path / "q.pt2")
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "q.pt2").module()(sample=X, timestep=T), tiny(X, T))


@pytest.mark.parametrize("setting", EACH)
@pytest.mark.parametrize(
    "how", [{"engine": "openvino"}, {"engine": "torch", "compile": False}], ids=["openvino", "torch"]
)
def test_a_lowered_network_computes_the_same_inside_and_outside(setting, how, tiny):
    with torch.no_grad():
        expected = lower(tiny, "cpu", precision="float32", batch=4, **how)(X, T)
    with setting():
        low = lower(tiny, "cpu", precision="float32", batch=4, **how)
        inside = low(X, T).detach()
    assert torch.equal(inside.clone(), expected)
    assert torch.equal(low(X, T), expected)


def test_rows_that_were_made_in_inference_mode_can_be_learned_from(tiny):
    with torch.inference_mode():
        data = tfmq_fx.CalibrationSet.from_tensors({n: x.clone() for n, x in calibration().tensors.items()})
    q = tfmq_fx.quantize(make(TinyUNet), RECIPE, calibration=data, seed=0)
    assert_equal(tensors_of(q.network), tensors_of(tiny.network))


def test_a_table_that_the_network_made_in_inference_mode_can_be_learned_through():
    class Caches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.a, self.out = (torch.nn.Linear(i, 8) for i in (1, 8, 8))
            self.table = None

        def forward(self, sample, timestep):
            if self.table is None:
                self.table = torch.linspace(0, 1, 8)
            h = sample + self.time(timestep.float()[:, None] / 1000)
            return self.out((self.a(h.relu()) * self.table).relu())

    network = Caches().eval()
    x, t = torch.randn(40, 8), torch.arange(0, 1000, 100).repeat(4)
    with torch.inference_mode():
        network(x, t)
    q = tfmq_fx.quantize(
        network, RECIPE, calibration=tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": t})
    )
    assert torch.isfinite(q(x, t)).all()


def test_weights_that_were_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        network = make(TinyUNet)
    with pytest.raises(TFMQError, match=r"weight .*: was made inside torch\.inference_mode"):
        tfmq_fx.capture(network, {"sample": X, "timestep": T})


def test_the_pipeline_is_recorded_under_the_callers_settings(pipe, monkeypatch):
    class Seen(Exception):
        pass

    def record(*_, **__):
        raise Seen(torch.is_autocast_enabled("cpu"), torch.get_default_dtype())

    monkeypatch.setattr(tfmq_fx.CalibrationSet, "record", record)
    for name, expected in (
        ("autocast", (True, torch.float32)),
        ("default dtype float64", (False, torch.float64)),
    ):
        with SETTINGS[name](), pytest.raises(Seen) as seen:
            tfmq_fx.quantize(pipe)
        assert seen.value.args == expected
