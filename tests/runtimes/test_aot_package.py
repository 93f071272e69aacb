"""AOTInductor's packages run without this library; what a compiler that lacks or fails leaves."""

import subprocess
import sys
import zipfile

import pytest
import torch

from benchmarks.networks.small import TIMESTEPS, Labelled
from tests.helpers.agreement import assert_same_but_for_flips
from tests.helpers.exported import SIZES, scalar
from tests.helpers.lowered import INT8
from tests.helpers.nearest import labelled
from tfmq_fx.base.arithmetic import NO_INT8
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.runtimes import aot_package


@pytest.mark.slow  # a minute of compiling; test_torch_engine.py compiles the same kernels
@torch.no_grad()
def test_an_aot_package_runs_int8_without_this_library(tmp_path):
    """Mixed timesteps and labels, batches of other sizes than it was compiled with, in another process."""
    q = labelled("w4a8")
    exported = q.export(tmp_path / "net.pt2", format="aot", strict=INT8)
    saturating = (
        "1 of 4 quantized layers saturate on a CPU without VNNI or AMX; to run there, compile on such a CPU"
    )
    in_float = f"1 of 4 quantized layers run in float; 1 would saturate: {NO_INT8}: time.weight"
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
        TFMQError, match=r'"aot" needs a C\+\+ compiler, but none of g\+\+, clang\+\+, c\+\+ is in PATH'
    ):
        scalar().export(tmp_path / "net.pt2", format="aot")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(TFMQError, match="CXX=/no/such/compiler was not found"):
        scalar().export(tmp_path / "net.pt2", format="aot")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(aot_package.sys, "executable", "/bin/false")
    with pytest.raises(TFMQError, match="AOTInductor cannot compile the graph"):
        scalar().export(tmp_path / "net.pt2", format="aot")
    assert list(tmp_path.iterdir()) == []
