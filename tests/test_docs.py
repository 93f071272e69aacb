"""The code in docs/ runs, from top to bottom of each file."""

import re
from pathlib import Path

import pytest
import torch

import tfmq_fx
from benchmarks.api_page import write

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))

pytestmark = [
    # diffusers' own, on this torch and numpy.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # What is lowered in a guide computes the same there.
    pytest.mark.filterwarnings("ignore:this CPU has no int8 instructions:UserWarning"),
]


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


def test_the_docstrings_render_as_pages(tmp_path):
    pages = {str(p.relative_to(tmp_path)): p.read_text() for p in write(tmp_path)}
    assert "tfmq_fx/calibration/data.html" in pages
    for name in tfmq_fx.__all__:
        assert any(f'id="{name}"' in page or f"/{name}.html" in page for page in pages.values()), name
    assert "one trajectory per sample" in pages["tfmq_fx/calibration/data.html"]
