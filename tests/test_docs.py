"""The code in docs/ runs, from top to bottom of each file."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))

# diffusers' own, on this torch and numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("file", DOCS, ids=lambda f: f.name)
def test_the_code_of_the_guide_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # where guides find the trained models
    blocks = re.findall(r"^```python\n(.*?)^```", file.read_text(), re.M | re.S)
    assert blocks
    namespace = {"__name__": file.stem}
    before = torch._inductor.config.pre_grad_custom_pass
    try:
        for block in blocks:
            exec(compile(block, str(file), "exec"), namespace)
    finally:
        torch._inductor.config.pre_grad_custom_pass = before  # torchao's x86 quantizer sets it at import
