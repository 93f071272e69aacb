"""Which engine lowers, on which target, and what it refuses."""

import copy
import logging
import pickle
import sys
from importlib.util import find_spec

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS
from tests.helpers.lowered import (
    INT8,
    assert_same_but_for_ties,
    kept,
    kernels_of,
    linear_alone,
    lower,
    needs_avx2,
    noise,
)
from tests.helpers.nearest import labelled, quantized
from tfmq_fx.base.arithmetic import NO_INT8
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.runtimes import lowering, torch_engine

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="this needs the openvino extra")


@needs_openvino
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "tpu"}, "target='tpu': unknown; use cpu"),
        ({"precision": "float16"}, "precision='float16': unknown; use (bfloat16|float32)"),
        *(
            ({"batch": batch}, rf"batch={batch!r}: is not a batch size; use a positive integer")
            for batch in (0, -1, 2.5, "2", None, True)
        ),
        ({"compile": "yes"}, "compile: expected bool, found str; use True, False or None"),
        ({"cache": 5}, "cache: expected str or Path, found int; name a folder"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(TFMQError, match=words):
        quantized().lower(**arguments)


@needs_openvino
@pytest.mark.skipif(INT8, reason="this CPU has int8 instructions")
@needs_avx2
def test_linear_layers_that_gain_nothing_are_told(monkeypatch):
    said = []
    monkeypatch.setattr(lowering.log, "warning", lambda words, *rest: said.append(words % rest))
    lower(linear_alone(4), "cpu", engine="openvino", precision="float32")
    assert [words for words in said if "no faster than float" in words and 'engine="torch"' in words]
    said.clear()
    lower(quantized("w4a8"), "cpu", precision="float32", cache=kept())  # convolutions
    assert not said


@needs_openvino
@needs_avx2
@torch.no_grad()
@pytest.mark.usefixtures("without_vnni")
def test_without_vnni_networks_of_linear_layers_run_on_torchs_kernels():
    networks, x = [linear_alone(4), linear_alone(8), quantized("w4a8")], torch.randn(5, 4)
    with pytest.warns(UserWarning, match=NO_INT8[:20]):
        found = [q.lower("cpu", precision="float32", cache=kept()) for q in networks]
    assert_same_but_for_ties([(found[0](x, t), networks[0](x, t)) for t in TIMESTEPS])
    reports = [low.report["lowering"] for low in found]
    assert [report["engine"] for report in reports] == ["torch", "openvino", "openvino"]
    assert not reports[0]["compiled"]
    assert reports[0]["flops"]["int8"] > 0.9 * reports[0]["flops"]["total"]


@needs_openvino
def test_lowering_leaves_the_quantized_network_as_it_is(tmp_path):
    with torch.no_grad():
        before = quantized()(noise(2), 300)
        lower(quantized(), "cpu", cache=kept())
        assert torch.equal(quantized()(noise(2), 300), before)
    quantized().save_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(tfmq_fx.load(tmp_path / "q")(noise(2), 300), before)


def test_a_lowered_network_is_neither_copied_nor_pickled():
    low = lower(quantized("w4a8"), engine="torch", precision="float32", compile=False)
    for make_another in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TFMQError, match=r"cannot be copied or pickled; .*save the network that it was"):
            make_another(low)


def test_the_engines_count_the_same_layers():
    pytest.importorskip("openvino")
    other = lower(labelled("w8a8"), engine="openvino", precision="float32")
    ours = lower(labelled("w8a8"), engine="torch", precision="float32", compile=False)
    assert other.report["lowering"]["engine"] == "openvino"
    assert other.report["lowering"]["flops"] == ours.report["lowering"]["flops"]
    assert kernels_of(other).keys() == kernels_of(ours).keys()


def test_without_openvino_torch_lowers_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(lowering, "find_spec", lambda _: None)
    monkeypatch.setattr(torch_engine, "compiler_missing", lambda: "no C++ compiler (none)")
    with caplog.at_level(logging.WARNING, lowering.log.name):
        low = lower(quantized(), precision="float32")
    assert low.report["lowering"]["engine"] == "torch"
    said = [r.message for r in caplog.records if r.name == lowering.log.name]
    assert len(said) == 1
    assert "openvino is not installed" in said[0]
    assert 'pip install "tfmq_fx[openvino]"' in said[0]
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TFMQError, match=r'pip install "tfmq_fx\[openvino\]"'):
        quantized().lower(engine="openvino")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"engine": "onnx"}, "engine='onnx': unknown; use"),
        ({"engine": "torch", "pack": "int2"}, "pack='int2': unknown; use \"int4\""),
        ({"engine": "openvino", "pack": "int4"}, 'hold weights as bytes; use engine="torch"'),
        ({"engine": "openvino", "compile": False}, 'OpenVINO always compiles.* use engine="torch"'),
        ({"engine": "torch", "precision": "float16"}, "precision='float16': unknown"),
    ],
)
def test_what_an_engine_has_not_is_refused(arguments, words):
    pytest.importorskip("openvino")
    with pytest.raises(TFMQError, match=words):
        quantized().lower(**arguments)


@needs_avx2
def test_a_zero_point_for_each_timestep_keeps_the_calibrated_sizes():
    q = quantized("w4a8", "all", shared_zero_point=False)
    low = lower(q, "cpu", engine="torch", precision="float32", compile=False)
    assert low.report["lowering"]["notes"] == ["takes sample as (N, 1, 8, 8) alone"]
    wider = torch.zeros(1, 1, 8, 16)
    assert q(wider, TIMESTEPS[:1]).shape == wider.shape
    with pytest.raises(TFMQError, match=r"'sample' has shape \(1, 1, 8, 16\), captured with \(N, 1, 8, 8\)"):
        low(wider, TIMESTEPS[:1])
