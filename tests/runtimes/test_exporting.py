"""The format that a file's name asks for, and the command line."""

import numpy as np
import pytest

from tests.helpers.command_line import run
from tests.helpers.exported import scalar, session
from tfmq_fx.artefact import program
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.runtimes import exporting


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
    for package in ("onnx_ir", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX needs the onnx extra")
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


def test_every_format_has_a_writer_and_a_suffix():
    assert exporting.SUFFIXES.keys() == exporting._WRITERS.keys()
    assert program.example_inputs(scalar(), batch=3)["sample"].shape == (3, 4)


def test_an_unknown_export_suffix_is_refused(tiny, tmp_path):
    with pytest.raises(TFMQError, match=r"'\.exe' is not supported"):
        tiny.export(tmp_path / "net.exe")
    assert list(tmp_path.iterdir()) == []
