import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_rooms_and_the_model_and_no_generic_names(tmp_path):
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(wheel, check=True, capture_output=True)
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"tfmq_fx/passes/find_temporal.py", "tfmq_fx/observers/minmax.py", "tfmq_fx/py.typed"} <= set(
        names
    )
    assert "tfmq_fx/ddpm-digits/unet/diffusion_pytorch_model.safetensors" in names
    assert not any(n.startswith(("passes/", "observers/", "tests/", "benchmarks/")) for n in names)
    code = (
        "import sys; sys.path.insert(0, 'site'); import tfmq_fx.passes.prepare; assert 'site' in sys.modules['tfmq_fx.passes.prepare'].__file__\n"
        "try:\n    import passes\nexcept ImportError:\n    sys.exit(0)\nsys.exit('a bare passes is importable')"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True
    )
