"""Every stage on a device that is not the CPU's, of a kind that refuses tensors of both in one operation."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.helpers.second_device import RECIPES

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")), reason="the device is compiled by g++ and ninja"
)


def check(folder, names):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.second_device", str(folder), *names],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [f["recipe"] for f in found] == list(names)
    for f in found:
        assert f["device"] == "second"
        assert f["strays"] == []
        # Sums in another order flip roundings at ties; what a wrong scale or index would do is of the output's size.
        assert f["to_cpu"] < 0.2, f
        assert f["loaded"] < 1e-5, f


@needs_compiler
def test_choosing_and_second_order_rounding(tmp_path):
    check(tmp_path, ["chosen", "gptq"])


@needs_compiler
@pytest.mark.slow
def test_every_setting(tmp_path):
    check(tmp_path, [*RECIPES])
