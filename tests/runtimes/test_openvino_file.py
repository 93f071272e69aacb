"""What is written for OpenVINO, and what keeps it from being written."""

import sys

import pytest
import torch
from torch import nn

from benchmarks.networks.small import ScalarTime
from tests.helpers.exported import session
from tests.helpers.lowered import INT8, assert_same_but_for_ties, lower, mixed, noise
from tests.helpers.nearest import one_timestep, quantized
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.runtimes.openvino_file import FLOAT, MODEL

openvino = pytest.importorskip("openvino", reason="lowering needs the openvino extra")


def test_nobody_is_told(monkeypatch, tmp_path):
    """OpenVINO's own `convert_model` sends what it did to Google Analytics, unless the user has forbidden it."""
    told = []
    telemetry = pytest.importorskip("openvino_telemetry").Telemetry
    monkeypatch.setattr(telemetry, "send_event", lambda _, *words, **__: told.append(words))
    quantized("w4a8").export(tmp_path / "ir")
    assert not told


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TFMQError, match=r'pip install "tfmq_fx\[openvino\]"'):
        quantized().lower("cpu", engine="openvino")


class Strange(nn.Module):
    """An operator of which OpenVINO has no form."""

    def __init__(self):
        super().__init__()
        self.net = ScalarTime()

    def forward(self, sample, timestep):
        return torch.special.bessel_j0(self.net(sample, timestep))


class Filtered(nn.Module):
    """It multiplies a spectrum by complex numbers. OpenVINO has real products, and fft."""

    def __init__(self):
        super().__init__()
        self.net = ScalarTime()
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.rand(4)))

    def forward(self, sample, timestep):
        return torch.fft.ifft(torch.fft.fft(self.net(sample, timestep)) * self.turn).real


def test_what_openvino_lacks_names_the_engine_that_has_it():
    q = one_timestep(Filtered)
    with pytest.raises(
        TFMQError, match=r"aten\.mul\.Tensor of complex numbers; q\.lower\(.*engine=\"torch\"\)"
    ):
        lower(q, engine="openvino")
    low = lower(q, engine="torch", compile=False, precision="float32")
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert low(x, 300).shape == q(x, 300).shape == (2, 4)


def test_an_operator_that_openvino_lacks_names_its_node():
    with pytest.raises(
        TFMQError, match=r"node special_bessel_j0: OpenVINO cannot express aten\.special_bessel_j0"
    ):
        lower(one_timestep(Strange), "cpu")


@torch.no_grad()
def test_the_exported_folder_is_openvinos_alone(tmp_path):
    import openvino

    exported = quantized().export(tmp_path / "ir")
    words = "12 of 12 quantized layers saturate on a CPU without VNNI or AMX, unless OpenVINO compiles them there with"
    bytes_alone, sizes = exported.notes
    assert bytes_alone == f"{words} {FLOAT}"
    assert sizes.startswith("the file does not check that sizes are")
    assert {f.name for f in (tmp_path / "ir").iterdir()} == {"network.xml", "network.bin", "layers.json"}
    hint = {"INFERENCE_PRECISION_HINT": "f32", **({} if INT8 else FLOAT)}
    model = openvino.Core().compile_model(tmp_path / "ir" / "network.xml", "CPU", hint)
    x, t = noise(4), mixed(4)
    got = torch.from_numpy(model({"sample": x.numpy(), "timestep": t.numpy()})[0])
    assert_same_but_for_ties([(got, quantized()(x, t))])
    # With 4 bits all but the few of 8 fit, and those are in float: the same numbers on every CPU.
    exported = quantized("w4a8").export(tmp_path / "ir")  # over it
    words, _ = exported.notes
    assert words.startswith(
        "1 of 12 quantized layers saturate on a CPU without VNNI or AMX: they are in float (0.0"
    )
    model = openvino.Core().compile_model(
        tmp_path / "ir" / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    got = torch.from_numpy(model({"sample": x.numpy(), "timestep": t.numpy()})[0])
    assert_same_but_for_ties([(got, quantized("w4a8")(x, t))])
    (tmp_path / "ir" / "mine.txt").write_text("")
    with pytest.raises(TFMQError, match="holds something else"):
        quantized().export(tmp_path / "ir")
    with pytest.raises(TFMQError, match=r"'\.xml' is not supported; use \.pt2, \.onnx, or a folder"):
        quantized().export(tmp_path / "net.xml")


class Repeating(ScalarTime):
    def forward(self, sample, timestep):
        y = super().forward(sample, timestep)
        return {"a": y, "b": [y, 2 * y], "given": sample}


def test_a_tensor_that_is_returned_twice_and_an_input_that_is_returned(tmp_path):
    q = one_timestep(Repeating)
    x, t = torch.randn(3, 4), torch.tensor(7)
    with torch.no_grad():
        found, expected = lower(q, precision="float32", batch=3)(x, t), q(x, t)
    assert torch.equal(found["given"], x)
    assert torch.equal(found["a"], found["b"][0])
    assert_same_but_for_ties([(found["a"], expected["a"]), (found["b"][1], expected["b"][1])])
    q.export(tmp_path / "net")
    written = openvino.Core().read_model(tmp_path / "net" / MODEL)
    assert len(written.outputs) == 4
    assert [i.get_element_type().to_string() for i in written.inputs] == ["f32", "i64"]


class Rotary(nn.Module):
    """It multiplies complex numbers, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.net = ScalarTime()
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.rand(2)))

    def forward(self, sample, timestep):
        pairs = torch.view_as_complex(self.net(sample, timestep).unflatten(-1, (2, 2)))
        return torch.view_as_real(pairs * self.turn).flatten(-2)


@torch.no_grad()
def test_rotary_embeddings_are_computed_in_their_parts(tmp_path):
    q, x = one_timestep(Rotary), torch.randn(3, 4)
    assert_same_but_for_ties([(lower(q, engine="openvino", precision="float32")(x, 300), q(x, 300))])
    q.export(tmp_path / "net.onnx")
    given = {"sample": x.numpy(), "timestep": torch.tensor(300).numpy()}
    (found,) = session(tmp_path / "net.onnx").run(None, given)
    assert_same_but_for_ties([(torch.from_numpy(found), q(x, 300))])


class Normed(nn.Module):
    """An instance norm and an attention by einsum, as exported networks have them."""

    def __init__(self):
        super().__init__()
        self.net, self.norm = ScalarTime(), nn.InstanceNorm1d(2)

    def forward(self, sample, timestep):
        x = self.norm(self.net(sample, timestep).unflatten(-1, (2, 2)))
        weights = torch.einsum("bct,bcs->bts", x, x).softmax(-1)
        return torch.einsum("bts,bcs->bct", weights, x).flatten(1)


def test_norms_are_by_channel_and_einsums_are_products(tmp_path):
    q = one_timestep(Normed)
    q.export(tmp_path / "ir")
    model = openvino.Core().read_model(tmp_path / "ir" / MODEL)
    kinds = [op.get_type_name() for op in model.get_ops()]
    assert kinds.count("ReduceMean") == 2  # the mean and the variance
    assert not {"MVN", "Einsum"} & set(kinds)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert_same_but_for_ties([(lower(q, engine="openvino", precision="float32")(x, 300), q(x, 300))])
