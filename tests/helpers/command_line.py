"""The command line as a function, and folders that it cannot read."""

import sys

from tfmq_fx import cli


def run(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr) of the command line."""
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
