"""Exported files compute the quantized network in their own runtime, on int8 kernels, or say what does not."""

import dataclasses
import functools
import itertools
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, ScalarTime, TinyUNet, calibration, make
from tests.helpers.lowered import INT8
from tests.test_cli import run
from tests.whole.test_finite import Labelled
from tests.whole.test_granularity import Tokens
from tests.whole.test_mixed_batches import assert_same_but_for_flips, labelled, moved, one_timestep, vectors
from tfmq_fx.artefact import program
from tfmq_fx.base.arithmetic import NO_INT8
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes import (
    flatten_linears,
    rescale_temporal,
    rescale_tokens,
    signed_weights,
    unfold_convolutions,
)
from tfmq_fx.passes.int8.unfold_convolutions import _places
from tfmq_fx.runtimes import aot_package, exporting, onnx_file

onnx_ir = pytest.importorskip("onnx_ir", reason="ONNX needs the onnx extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs the onnx extra")
NEAREST = tfmq_fx.Reconstruction(method="nearest")
SIZES = (1, 2, 5)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@functools.cache
def quantized(network_class=TinyUNet, bits="w4a8", **changes):
    recipe = dataclasses.replace(tfmq_fx.Recipe.preset(bits), reconstruction=NEAREST, **changes)
    return tfmq_fx.quantize(make(network_class), recipe, calibration=calibration())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(format) -> what was exported of the tiny network, once each."""
    folder = tmp_path_factory.mktemp("exports")
    return functools.cache(lambda format: quantized().export(folder / f"{format}.onnx", format=format))


@functools.cache
def scalar():
    """The quickest network to export: linears, and a timestep of shape ()."""
    return one_timestep(ScalarTime)


def session(file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def runs(file):
    """The exported network as a function of tensors by name."""
    loaded = session(file)
    return lambda **x: torch.from_numpy(loaded.run(None, {n: v.numpy() for n, v in x.items()})[0])


def rows(size):
    """Noise, and timesteps that are mixed in the batch."""
    x = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(size))
    return {"sample": x, "timestep": TIMESTEPS[torch.arange(size) * 3 % 10]}


def counts(file):
    model = onnx_ir.load(file)
    stored = Counter(
        v.dtype.name for v in model.graph.initializers.values() if len(v.shape) > 1 and "weight_q" in v.name
    )
    return model, Counter(n.op_type for n in model.graph), stored


@pytest.mark.parametrize("format", ["onnx", "onnxruntime"])
@torch.no_grad()
def test_onnx_gives_what_the_quantized_network_gives(files, format):
    """Another runtime adds floats in another order; bounds as in test_mixed_batches. 4e-7 was measured, no flips."""
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
    assert exported.notes == ()
    _, operators, stored = counts(exported.file)
    assert operators["Conv"] == 2
    assert stored["UINT4"] == 11
    assert "FLOAT" not in stored
    assert exported.bytes == exported.file.stat().st_size
    # the standard form's convolutions, and its 4-bit weights, run in float there: said, and refused on request
    assert files("onnx").kernels == {"int8": 1, "float": 13}
    assert files("onnx").notes == ("11 of 12 quantized layers run in float",)


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
    with pytest.raises(TFMQError, match="strict: 2 of 2 quantized layers run in float"):
        scalar().export(tmp_path / "net.onnx", strict=True)
    with pytest.raises(TFMQError, match="strict: which kernels run is not known of format 'pt2'"):
        scalar().export(tmp_path / "net.pt2", strict=True)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_transformer_with_scales_per_token_rotation_and_a_low_rank_branch(tmp_path):
    q = quantized(Tokens, "w4a8", activation_granularity="token", low_rank=2, rotate=4)
    exported = q.export(tmp_path / "net.onnx")
    net = runs(exported.file)
    assert_same_but_for_flips([(net(**rows(n)), q(**rows(n))) for n in SIZES])
    # in float are the convolution of groups and the transposed one, besides both ends; and the branches' products
    assert exported.notes == ("2 of 11 quantized layers run in float",)


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


@torch.no_grad()
def test_an_aot_package_runs_int8_without_this_library(tmp_path):
    """Mixed timesteps and labels, batches of other sizes than it was compiled with, in another process."""
    q = labelled("w4a8")
    exported = q.export(tmp_path / "net.pt2", format="aot", strict=INT8)
    saturating = "1 of 4 quantized layers saturate on a CPU without VNNI or AMX: compile there for it"
    in_float = f"1 of 4 quantized layers run in float; 1 would saturate: {NO_INT8}"
    assert exported.notes == (saturating if INT8 else in_float,)
    assert exported.kernels == ({"int8": 4, "float": 2} if INT8 else {"int8": 3, "float": 3})
    with zipfile.ZipFile(exported.file) as package:
        sources = "".join(package.read(n).decode() for n in package.namelist() if n.endswith("wrapper.cpp"))
    assert sources.count("aoti_torch_cpu__qconv_pointwise_tensor(") == 1
    assert sources.count("aoti_torch_cpu__qlinear_pointwise_tensor(") == (3 if INT8 else 2)
    batches = [
        (torch.randn(n, 1, 6, 6), TIMESTEPS[torch.arange(n) * 3 % 10], torch.arange(n) % Labelled.classes)
        for n in SIZES
    ]
    torch.save(batches, tmp_path / "inputs.pt")
    code = (
        "import torch, sys; from torch._inductor import aoti_load_package;"
        "net = aoti_load_package('net.pt2');"
        "y = [net(sample=x, timestep=t, class_labels=c) for x, t, c in torch.load('inputs.pt')];"
        "assert not any(m.startswith(('tfmq', 'torchao')) for m in sys.modules);"
        "torch.save([v if isinstance(v, torch.Tensor) else v[0] for v in y], 'y.pt')"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert_same_but_for_flips(
        [(y, q(*batch)) for y, batch in zip(torch.load(tmp_path / "y.pt"), batches, strict=True)]
    )


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        TFMQError, match=r'"aot" needs a C\+\+ compiler, and none of g\+\+, clang\+\+, c\+\+ is in PATH'
    ):
        scalar().export(tmp_path / "net.pt2", format="aot")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(TFMQError, match="CXX=/no/such/compiler is not there"):
        scalar().export(tmp_path / "net.pt2", format="aot")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(aot_package.sys, "executable", "/bin/false")
    with pytest.raises(TFMQError, match="AOTInductor cannot compile the graph"):
        scalar().export(tmp_path / "net.pt2", format="aot")
    assert list(tmp_path.iterdir()) == []


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
        match=r"node bessel_j0: ONNX has no form of prims\.bessel_j0\.default \(No ONNX function found",
    ):
        one_timestep(Strange).export(tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "format", "words"),
    [
        ("net.exe", None, r"the suffix '\.exe' is not supported; use \.pt2, \.onnx, or a folder"),
        ("net.onnx", "tensorrt", "format='tensorrt' is unknown; use pt2, aot, onnx, onnxruntime, openvino"),
        ("net.pt2", "onnx", r"net\.pt2: format 'onnx' needs a name that ends in \.onnx"),
        ("net.onnx", "openvino", "format 'openvino' needs a folder without suffix"),
    ],
)
def test_unknown_formats_are_refused(tmp_path, file, format, words):
    with pytest.raises(TFMQError, match=words):
        scalar().export(tmp_path / file, format=format)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_exports(monkeypatch, capsys, tmp_path):
    scalar().save_pretrained(tmp_path / "q")
    code, out, err = run(monkeypatch, capsys, "export", tmp_path / "q", tmp_path / "net.onnx", "--strict")
    assert (code, err) == (0, "")
    assert "onnxruntime, " in out
    assert "2 layers int8, 2 layers float" in out
    x = np.zeros((3, 4), np.float32)
    assert session(tmp_path / "net.onnx").run(None, {"sample": x, "timestep": np.array(7)})[0].shape == (3, 4)
    for arguments, words in (
        ((tmp_path / "q", tmp_path / "net.exe"), "the suffix '.exe' is not supported"),
        ((tmp_path / "none", tmp_path / "net.onnx"), "no such folder"),
        ((tmp_path / "q", tmp_path / "net.onnx", "--format", "tensorrt"), "format='tensorrt' is unknown"),
    ):
        code, out, err = run(monkeypatch, capsys, "export", *arguments)
        assert (code, out) == (2, "")
        assert words in err
        assert len(err.strip().splitlines()) == 1


def graph(network_class=Tokens, **changes):
    gm = program.exported(quantized(network_class, "w4a8", **changes)).module(check_guards=False)
    gm.meta = {}
    rescale_temporal(gm)
    return gm


def targets(gm):
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


QDQ = "quantized_decomposed"


@pytest.mark.parametrize(
    ("given", "change", "before", "after"),
    [
        (
            functools.partial(graph, TinyUNet),
            unfold_convolutions,
            {"aten.conv2d.default": 8, "aten.linear.default": 6},
            {"aten.conv2d.default": 2, "aten.linear.default": 12},
        ),
        (
            graph,
            signed_weights,
            {f"{QDQ}.dequantize_per_channel.default": 13},
            {f"{QDQ}.dequantize_per_channel.default": 13},
        ),
        (graph, flatten_linears, {"aten.reshape.default": 2}, {"aten.reshape.default": 2 + 6 + 6}),
        (
            functools.partial(graph, activation_granularity="token"),
            rescale_tokens,
            {f"{QDQ}.quantize_per_token.default": 4, f"{QDQ}.quantize_per_tensor.default": 5},
            {f"{QDQ}.quantize_per_tensor.default": 9},
        ),
    ],
    ids=["unfold_convolutions", "signed_weights", "flatten_linears", "rescale_tokens"],
)
@torch.no_grad()
def test_the_passes_keep_the_values(given, change, before, after):
    gm, batches = given(), [rows(n) for n in (2, 33)]
    expected = [gm(**batch) for batch in batches]
    found = targets(gm)
    assert {op: found[op] for op in before} == before
    assert change(gm).modified
    assert_same_but_for_flips([(gm(**batch), y) for batch, y in zip(batches, expected, strict=True)])
    if change is signed_weights:
        assert all(torch.equal(gm(**batch), y) for batch, y in zip(batches, expected, strict=True))
        kinds = {n.args[-1] for n in gm.graph.nodes if "dequantize_per_channel" in str(n.target)}
        assert kinds == {torch.int8}
    found = targets(gm)
    assert {op: found[op] for op in after} == after
    assert not change(gm).modified


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [([9], [3], [2], [1], [2]), ([9, 8], [3, 2], [2, 1], [0, 2], [2, 3]), ([4, 5, 6], [2, 3, 1], [1, 2, 2], [1, 0, 1], [1, 2, 1])],
)  # fmt: skip
def test_patches_are_what_a_convolution_sees(size, kernel, stride, padding, dilation):
    n = len(size)
    convolution = getattr(torch.nn.functional, f"conv{n}d")
    x, w = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    expected = convolution(x, w, None, stride, padding, dilation)
    padded = torch.nn.functional.pad(x, [p for size in reversed(padding) for p in (size, size)])
    index = _places(list(padded.shape[2:]), kernel, stride, dilation)
    rows = padded.movedim(1, -1).reshape(2, -1, 3).index_select(1, index)
    rows = rows.reshape(2, *expected.shape[2:], -1)
    got = torch.nn.functional.linear(rows, w.flatten(2).movedim(1, 2).flatten(1)).movedim(-1, 1)
    torch.testing.assert_close(got, expected)


def test_every_format_has_a_writer_and_a_suffix():
    assert exporting.SUFFIXES.keys() == exporting._WRITERS.keys()
    assert program.example_inputs(scalar(), batch=3)["sample"].shape == (3, 4)
