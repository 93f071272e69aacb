"""A disk that is full, and one that is read-only: one TFMQError, and nothing half-written is left.

RLIMIT_FSIZE gives the writers what a full disk gives them, an error in the middle of a file, for root too.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tfmq_fx import resume
from tfmq_fx.errors import TFMQError
from tfmq_fx.exporting import replace_files

SCRIPT = """
import resource, signal, sys, tempfile, torch
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError instead
import tfmq_fx
from tests.networks import FAST, TinyUNet, calibration, make
from tfmq_fx.sampling import save_grid
from tfmq_fx.spill import Budget, Values
from tfmq_fx.errors import TFMQError

torch.set_num_threads(1)
folder = Path(sys.argv[1])
tempfile.tempdir = str(folder)
recipe = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
q = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration(10))

def spill():
    with Budget(0) as budget:
        node = torch.fx.Graph().create_node("call_function", torch.relu)
        Values(budget)[node] = torch.randn(100_000)

WRITERS = {
    "save": lambda: q.save_pretrained(folder / "q"),
    "again": lambda: q.save_pretrained(folder / "kept"),
    "pt2": lambda: q.export(folder / "net.pt2"),
    "openvino": lambda: q.export(folder / "ir"),
    "png": lambda: save_grid([("a", torch.rand(64, 3, 16, 16))], folder / "grid.png"),
    "spill": spill,
}
q.save_pretrained(folder / "kept")
for name, write in WRITERS.items():
    for limit in (1000,) if name == "openvino" else (0, 1000, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write()
            print(name, limit, "no error", flush=True)
        except TFMQError as error:
            print(name, limit, "lines", len(str(error).splitlines()), flush=True)
        except BaseException as error:
            print(name, limit, type(error).__name__, error, flush=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        left = [p.name for p in folder.iterdir() if p.name != "kept"]
        if left:
            print(name, limit, "left", left, flush=True)
tfmq_fx.load(folder / "kept")
"""


def test_a_full_disk(tmp_path):
    """Each writer, at three sizes of what still fits."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    writers = ("save", "again", "pt2", "openvino", "png", "spill")
    assert [line for line in found.stdout.splitlines() if line.startswith(writers)] == [
        f"{w} {limit} lines 1" for w in writers for limit in ((1000,) if w == "openvino" else (0, 1000, 5000))
    ]


def test_a_disk_that_is_read_only(tiny):
    """/proc takes no files, not even root's."""
    from tfmq_fx.sampling import save_grid

    writers = [
        lambda: tiny.save_pretrained("/proc/q"),
        lambda: tiny.export("/proc/net.pt2"),
        lambda: save_grid([("a", torch.rand(4, 1, 8, 8))], Path("/proc/grid.png")),
        lambda: save_grid([("a", torch.rand(4, 1, 8, 8))], Path("/proc/sub/grid.png")),
        lambda: replace_files(Path("/proc/net.onnx"), lambda f: f.write_text("")),
        lambda: resume._open(Path("/proc/state"), "fingerprint"),
    ]
    for write in writers:
        with pytest.raises(TFMQError, match="cannot") as error:
            write()
        assert "/proc" in str(error.value)
        assert len(str(error.value).splitlines()) == 1
