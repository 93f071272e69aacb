"""The network as torch.export's program."""

import subprocess
import sys

import torch

from benchmarks.networks.small import calibration

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]


def test_a_pt2_gives_the_same_numbers_without_this_library(tiny, tmp_path):
    tiny.export(tmp_path / "net.pt2")
    torch.save({"sample": X, "timestep": T}, tmp_path / "inputs.pt")
    code = (
        "import torch; from torch.ao.quantization.fx import _decomposed; import sys;"
        "assert not any(m.startswith('tfmq') for m in sys.modules);"
        "i = torch.load('inputs.pt'); y = torch.export.load('net.pt2').module()(**i);"
        "torch.save(y.detach(), 'y.pt')"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True
    )
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), tiny(X, T))
