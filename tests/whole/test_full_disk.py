"""A disk that is full, and one that is read-only: one TFMQError, and nothing half-written is left.

RLIMIT_FSIZE gives the writers what a full disk gives them, an error in the middle of a file, for root too.
"""

import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TinyUNet, calibration, make
from tests.helpers.processes import finish, start
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files
from tfmq_fx.evaluation.sampling import save_grid
from tfmq_fx.reconstruction import resume
from tfmq_fx.reconstruction.spill import Budget, Values

WRITERS = ("save", "again", "pt2", "openvino", "png", "spill")


def limits_of(writer):
    return (1000,) if writer == "openvino" else (0, 1000, 5000)


def write_all(talk, folder):
    """Each writer, at three sizes of what still fits; what it raised and left, as lines."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError instead
    tempfile.tempdir = str(folder)
    recipe = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    q = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration(10))
    pictures = [("a", torch.rand(64, 3, 16, 16))]

    def spill():
        with Budget(0) as budget:
            node = torch.fx.Graph().create_node("call_function", torch.relu)
            Values(budget)[node] = torch.randn(100_000)

    writes = (
        lambda: q.save_pretrained(folder / "q"),
        lambda: q.save_pretrained(folder / "kept"),
        lambda: q.export(folder / "net.pt2"),
        lambda: q.export(folder / "ir"),
        lambda: save_grid(pictures, folder / "grid.png"),
        spill,
    )
    q.save_pretrained(folder / "kept")
    said = []
    for name, write in zip(WRITERS, writes, strict=True):
        for limit in limits_of(name):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                write()
                said.append(f"{name} {limit} no error")
            except TFMQError as error:
                said.append(f"{name} {limit} lines {len(str(error).splitlines())}")
            except BaseException as error:
                said.append(f"{name} {limit} {type(error).__name__} {error}")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            left = [p.name for p in folder.iterdir() if p.name != "kept"]
            if left:
                said.append(f"{name} {limit} left {left}")
    tfmq_fx.load(folder / "kept")
    talk.send(said)


def test_a_full_disk(tmp_path):
    assert finish(*start(write_all, tmp_path)) == [
        f"{w} {limit} lines 1" for w in WRITERS for limit in limits_of(w)
    ]


def test_a_disk_that_is_read_only(tiny):
    """/proc takes no files, not even root's."""
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
