"""Exported files compute the quantized network in their own runtime, on int8 kernels, or say what does not."""

import functools
import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, ScalarTime, Tokens, make, vectors
from tests.helpers.agreement import assert_same_but_for_flips, moved
from tests.helpers.exported import SIZES, quantized, rows, scalar, session
from tests.helpers.nearest import one_timestep
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.runtimes import onnx_file

onnx_ir = pytest.importorskip("onnx_ir", reason="ONNX needs the onnx extra")
pytest.importorskip("onnxruntime", reason="ONNX needs the onnx extra")
NEAREST = tfmq_fx.Reconstruction(method="nearest")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(format) -> what was exported of the tiny network, once each."""
    folder = tmp_path_factory.mktemp("exports")
    return functools.cache(lambda format: quantized().export(folder / f"{format}.onnx", format=format))


def runs(file):
    """The exported network as a function of tensors by name."""
    loaded = session(file)
    return lambda **x: torch.from_numpy(loaded.run(None, {n: v.numpy() for n, v in x.items()})[0])


def counts(file):
    model = onnx_ir.load(file)
    stored = Counter(
        v.dtype.name for v in model.graph.initializers.values() if len(v.shape) > 1 and "weight_q" in v.name
    )
    return model, Counter(n.op_type for n in model.graph), stored


@pytest.mark.parametrize("format", ["onnx", "onnxruntime"])
@torch.no_grad()
def test_onnx_gives_what_the_quantized_network_gives(files, format):
    """Another runtime adds floats in another order; bounds as in tests.helpers.agreement. 4e-7 was measured, no flips."""
    q, net = quantized(), runs(files(format).file)
    pairs = [(net(**rows(n)), q(**rows(n))) for n in SIZES]
    x = rows(2)["sample"]
    steps = [(net(sample=x, timestep=t.expand(2)), q(x, t)) for t in TIMESTEPS]
    assert_same_but_for_flips(pairs + steps)
    for (one, _), (other, _) in itertools.pairwise(steps):
        assert moved(one, other)[0].all()  # the control: the step shows
    # Beside the table, the nearest timestep's scales.
    assert_same_but_for_flips(
        [(net(sample=x, timestep=torch.tensor([449, 551])), q(x, torch.tensor([449, 551])))]
    )


def test_the_standard_form_is_qdq_with_four_bit_weights(files):
    model, operators, stored = counts(files("onnx").file)
    assert model.graph.opset_imports[""] == 21
    assert set(model.graph.opset_imports) == {""}
    # 14 layers, of which 12 read quantized inputs and two of those the same; each weight is dequantized by itself
    assert (operators["QuantizeLinear"], operators["DequantizeLinear"]) == (11, 11 + 14)
    assert (operators["Conv"], operators["ArgMin"]) == (8, 1)
    assert stored == {"UINT4": 11, "UINT8": 3}
    assert files("onnx").weights == {"int4": 11, "int8": 3}
    tables = [v for v in model.graph.initializers.values() if "by_timestep" in v.name]
    assert {v.shape[0] for v in tables} == {10}
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and len(node.inputs[0].shape or ()) == 4:
            channels = node.inputs[0].shape[node.attributes["axis"].as_int()]
            per_channel = node.inputs[0].is_initializer()
            assert list(node.inputs[1].shape) == ([channels] if per_channel else [])
    assert not any(n.metadata_props for n in model.graph)  # nothing of this machine's paths


def test_onnxruntime_computes_every_quantized_layer_in_bytes(files):
    exported = files("onnxruntime")
    assert exported.kernels == {"int8": 12, "float": 2}  # conv_in and conv_out keep float inputs
    assert exported.notes == ("takes sample as (N, 1, 8, 8) alone",)  # patches are of a known size
    _, operators, stored = counts(exported.file)
    assert operators["Conv"] == 2
    assert stored["UINT4"] == 11
    assert "FLOAT" not in stored
    assert exported.bytes == exported.file.stat().st_size
    # the standard form's convolutions, and its 4-bit weights, run in float there: said, and refused on request
    assert files("onnx").kernels == {"int8": 1, "float": 13}
    in_float, sizes = files("onnx").notes
    assert in_float.startswith("11 of 12 quantized layers run in float: ")
    assert in_float.endswith(", ...")
    assert "down.weight (Conv)" in in_float
    assert sizes.startswith("the file does not check that sizes are")


@pytest.mark.parametrize(
    "bits", [(8, 8), (4, 8), *(pytest.param(b, marks=pytest.mark.slow) for b in ((7, 8), (8, 4)))]
)
@torch.no_grad()
def test_no_kernel_reads_signed_bytes_whose_products_saturate(tmp_path, bits):
    """On x86 without VNNI two products of unsigned and signed bytes are added in 16 bits: 2 * 255 * 64 fits, not 65."""
    recipe = tfmq_fx.Recipe(
        weight_bits=bits[0],
        activation_bits=bits[1],
        reconstruction=NEAREST,
        edge_weight_bits=bits[0],
        edge_activation_bits=bits[1],
    )
    q = tfmq_fx.quantize(make(ScalarTime), recipe, calibration=vectors())
    exported = q.export(tmp_path / "net.onnx", strict=True)
    assert counts(exported.file)[2] == {"UINT4" if bits[0] == 4 else "UINT8": 4}
    x = torch.randn(5, 4)
    net = runs(exported.file)
    assert_same_but_for_flips([(net(sample=x, timestep=t.expand(5)), q(x, t)) for t in TIMESTEPS])


def test_strict_refuses_what_would_run_in_float_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_INT8_KERNELS", set())  # of another version of onnxruntime
    monkeypatch.setattr(onnx_file, "_FLOAT_KERNELS", {"MatMul", "Gemm", "MatMulIntegerToFloat"})
    words = r"strict: 2 of 2 quantized layers run in float: time\.0\.weight \(MatMulInteger"
    with pytest.raises(TFMQError, match=words):
        scalar().export(tmp_path / "net.onnx", strict=True)
    with pytest.raises(TFMQError, match="strict: which kernels run is not known for format 'pt2'"):
        scalar().export(tmp_path / "net.pt2", strict=True)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_transformer_with_scales_per_token_rotation_and_a_low_rank_branch(tmp_path):
    q = quantized(Tokens, "w4a8", activation_granularity="token", low_rank=2, rotate=4)
    exported = q.export(tmp_path / "net.onnx")
    net = runs(exported.file)
    assert_same_but_for_flips([(net(**rows(n)), q(**rows(n))) for n in SIZES])
    # in float are the convolution of groups and the transposed one, besides both ends; and the branches' products
    (note,) = exported.notes
    assert note == "2 of 11 quantized layers run in float: mix.weight (Conv), unpatch.weight (ConvTranspose)"


@torch.no_grad()
def test_float8_numbers_run_in_float_and_count_as_such(tmp_path):
    recipe = tfmq_fx.Recipe(weight_bits=8, linear_dtype="float8_e4m3fn", reconstruction=NEAREST)
    q = tfmq_fx.quantize(make(ScalarTime), recipe, calibration=vectors())
    written = q.export(tmp_path / "net.onnx")
    words = "2 of 2 quantized layers run in float; 2 multiply float8_e4m3fn, for which there is no kernel"
    assert words in written.notes
    x, t = torch.randn(10, 4), TIMESTEPS
    (y,) = session(written.file).run(None, {"sample": x.numpy(), "timestep": t.numpy()})
    assert_same_but_for_flips([(torch.from_numpy(y), q(x, t))])
    with pytest.raises(TFMQError, match=f"strict: {words}"):
        q.export(tmp_path / "strict.onnx", strict=True)


@torch.no_grad()
def test_a_network_of_one_timestep_per_call(tmp_path):
    q = scalar()
    net = runs(q.export(tmp_path / "net.onnx").file)
    pairs = []
    for size in SIZES:
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
        pairs += [(net(sample=x, timestep=t), q(x, t)) for t in TIMESTEPS]
    assert_same_but_for_flips(pairs)


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST", 100)
    file = tmp_path / "net.onnx"
    for _ in range(2):  # over itself, too
        exported = scalar().export(file)
    assert {f.name for f in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}
    assert exported.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert_same_but_for_flips([(runs(file)(sample=x, timestep=TIMESTEPS[1]), scalar()(x, TIMESTEPS[1]))])


@pytest.mark.parametrize("package", ["onnx_ir", "onnxscript"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TFMQError, match=r'pip install "tfmq_fx\[onnx\]"'):
        scalar().export(tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_the_file_is_written_and_its_kernels_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    exported = scalar().export(tmp_path / "net.onnx")
    assert exported.file.is_file()
    assert exported.kernels == {}
    assert exported.notes == ("onnxruntime is not installed: which kernels it runs is not known",)
    with pytest.raises(TFMQError, match=r'strict: .*pip install "tfmq_fx\[onnx\]"'):
        scalar().export(tmp_path / "other.onnx", strict=True)


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "net.onnx"
    file.write_text("old")

    def full(_model, path, **_rest):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(TFMQError, match=r"net\.onnx: cannot be written \(No space left on device\)"):
        scalar().export(file)
    assert [f.name for f in tmp_path.iterdir()] == ["net.onnx"]
    assert file.read_text() == "old"


class Strange(nn.Module):
    """An operator of which ONNX has no form."""

    def __init__(self):
        super().__init__()
        self.net = ScalarTime()

    def forward(self, sample, timestep):
        return torch.special.bessel_j0(self.net(sample, timestep))


def test_an_operator_that_onnx_lacks_names_its_node(tmp_path):
    with pytest.raises(
        TFMQError,
        match=r"node bessel_j0: ONNX cannot express prims\.bessel_j0\.default \(No ONNX function found",
    ):
        one_timestep(Strange).export(tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
