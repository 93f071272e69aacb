"""Run the command line as a function, and make folders that it cannot read."""

import sys

from tfmq_fx import cli


def run(monkeypatch, capsys, *args):
    """Run the command line, and return (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["tfmq", *map(str, args)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    return (code, *capsys.readouterr())


def corrupt(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
