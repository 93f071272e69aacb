from __future__ import annotations

import dataclasses
import functools
import shutil

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import FAST, TinyUNet, calibration, make
from tests.helpers.lowered import kept
from tfmq_fx.artefact import program
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.runtimes import aot_package, cpu, onnx_file

exported = functools.lru_cache(maxsize=8)(program.exported)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
    # Networks this small gain nothing from a second thread, and lose much if another process wants the core.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_export(monkeypatch):
    """Trace each network only once, whatever it is exported to: tracing is half of that time."""
    for module in (aot_package, onnx_file, program):
        monkeypatch.setattr(module, "exported", exported)


@pytest.fixture(autouse=True, scope="session")
def _nothing_kept():
    yield
    if kept.cache_info().currsize:
        shutil.rmtree(kept())


@pytest.fixture
def without_vnni(monkeypatch):
    monkeypatch.setattr(cpu, "int8_instructions", list)


@pytest.fixture
def without_int8(monkeypatch):
    monkeypatch.setattr(cpu, "int8_instructions", list)
    monkeypatch.setattr(cpu, "adds_pairs", lambda: False)


@pytest.fixture(scope="session")
def tiny() -> tfmq_fx.QuantizedModel:
    """Return the tiny network at W4A8, reconstructed briefly."""
    recipe = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=FAST)
    return tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration(), seed=0)


@pytest.fixture(scope="session")
def pipe():
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def digits(pipe) -> tfmq_fx.QuantizedModel:
    """Return the embedded model at W4A8 with ten timesteps and a few iterations of every stage."""
    data = tfmq_fx.CalibrationSet.record(pipe, num_samples=8, num_inference_steps=10, seed=0)
    quick = tfmq_fx.Reconstruction(iterations=10, temporal_iterations=300, num_samples=32, tune_iterations=2)
    return tfmq_fx.quantize(pipe, tfmq_fx.Recipe(reconstruction=quick), calibration=data, seed=0)
