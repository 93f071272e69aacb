import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return sorted(folder.iterdir(), key=lambda f: f.suffix, reverse=True)


def test_the_wheel_holds_the_rooms_and_the_model_and_no_generic_names(built, tmp_path):
    file, _ = built
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    for extra in ("onnx", "openvino", "report", "eval", "all", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata
    assert {
        "tfmq_fx/passes/temporal/find_temporal.py",
        "tfmq_fx/observers/minmax.py",
        "tfmq_fx/py.typed",
    } <= set(names)
    assert "tfmq_fx/ddpm-digits/unet/diffusion_pytorch_model.safetensors" in names
    assert not any(n.startswith(("passes/", "observers/", "tests/", "benchmarks/")) for n in names)
    code = (
        "import sys; sys.path.insert(0, 'site'); import tfmq_fx.passes.quantize.prepare; assert 'site' in sys.modules['tfmq_fx.passes.quantize.prepare'].__file__\n"
        "try:\n    import passes\nexcept ImportError:\n    sys.exit(0)\nsys.exit('a bare passes is importable')"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True
    )


def python(code, cwd=ROOT):
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_the_import_takes_little_beyond_torchs_own():
    code = "import time, torch; t = time.perf_counter(); import tfmq_fx; print(time.perf_counter() - t)"
    assert any(float(python(code)) < 1.5 for _ in range(3))  # another process may have had the core


IMPORT = """
import socket, sys
class NoSocket(socket.socket):
    def __init__(self, *_, **__): sys.exit("a socket was made")
socket.socket = NoSocket
import tfmq_fx
{then}
heavy = "transformers", "accelerate", "peft", "openvino", "onnx", "onnxruntime", "matplotlib", "jinja2", "torchmetrics", "torchvision"
print([m for m in heavy if m in sys.modules])
"""


@pytest.mark.parametrize("then", ["", "import tfmq_fx.cli"])
def test_the_import_asks_no_network_and_loads_no_extras(then):
    assert python(IMPORT.format(then=then)) == "[]\n"


def test_wheel_and_sdist_pass_twine_check(built):
    pytest.importorskip("twine")
    assert [f.suffix for f in built] == [".whl", ".gz"]
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count("PASSED") == 2
