"""The pages: their code runs, their commands parse, their links and names lead somewhere, and the README is short."""

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import tfmq_fx
from benchmarks.api_page import write
from tfmq_fx.cli import app
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.recipe import PRESETS

ROOT = Path(__file__).parent.parent
README, DOCS, MEASURED = ROOT / "README.md", ROOT / "docs", ROOT / "docs" / "measured"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
GUIDES = [p for p in PAGES if p.parent != MEASURED and p.name != "README.md"]
MAX_WORDS = 1200

pytestmark = [
    # diffusers' own, on this torch and numpy.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # What is lowered in a guide computes the same there.
    pytest.mark.filterwarnings("ignore:this CPU has no int8 instructions:UserWarning"),
]


def page_name(path):
    return str(path.relative_to(ROOT))


def blocks_of(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose_of(text):
    """A page without its blocks of code, in which # is no heading and [..](..) no link."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors_of(text):
    """What GitHub makes of the headings: lower case, punctuation gone, a number behind the second of a name."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?) *$", prose_of(text), re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if n == 0 else f"{slug}-{n}" for slug, last in found.items() for n in range(last + 1)}


def broken_links(page):
    """The relative links of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose_of(page.read_text()))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
            broken.append(link)
    return broken


def foreign_imports(text):
    """What a page imports that a reader with the package does not have."""
    nodes = [node for block in blocks_of(text) for node in ast.walk(ast.parse(block))]
    names = [n.name for node in nodes if isinstance(node, ast.Import) for n in node.names]
    names += [
        f"{node.module}.{n.name}" for node in nodes if isinstance(node, ast.ImportFrom) for n in node.names
    ]
    return [n for n in names if re.match(r"(tests|benchmarks\.networks)(\.|$)", n)]


def commands_of(text):
    """The arguments of every `tfmq ...` line in a page's blocks, fenced or indented; long lines joined."""
    fenced = "\n".join(re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.M | re.S))
    lines = [line for line in fenced.replace("\\\n", " ").splitlines() if line.startswith("tfmq ")]
    lines += re.findall(r"^    (tfmq .*)$", text, re.M)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def parse(command):
    """Read a command's options as the command line does, and do nothing with them."""
    name, *arguments = command
    with get_command(app).commands[name].make_context(name, arguments):
        pass


def missing_modules(text):
    """Modules that a page names, `python -m benchmarks.x` and tfmq_fx.x.y, and that do not exist."""
    missing = []
    for name in sorted(set(re.findall(r"\b(?:benchmarks|tfmq_fx)(?:\.[A-Za-z_]\w*)+", text))):
        module, _, rest = name.partition(".")
        if module == "benchmarks":
            if not (
                (ROOT / name.replace(".", "/")).is_dir() or list(ROOT.glob(name.replace(".", "/") + ".*"))
            ):
                missing.append(name)
            continue
        thing = tfmq_fx
        try:
            for part in rest.split("."):
                module = f"{module}.{part}"
                thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(module)
        except ModuleNotFoundError:
            missing.append(name)
    return missing


@pytest.mark.parametrize("file", [p for p in PAGES if p != README], ids=page_name)
def test_the_code_of_the_page_runs(file, tmp_path, monkeypatch):
    text = file.read_text()
    blocks = blocks_of(text)
    if file in GUIDES:
        assert blocks or commands_of(text), "a guide without anything to run"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # where guides find the trained models
    namespace = {"__name__": file.stem}
    before = torch._inductor.config.pre_grad_custom_pass
    try:
        for block in blocks:
            exec(compile(block, str(file), "exec"), namespace)
    finally:
        torch._inductor.config.pre_grad_custom_pass = before  # torchao's x86 quantizer sets it at import


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_code_of_the_readme_runs(number, tmp_path, monkeypatch):
    """Its first blocks, on two trajectories of two steps and rounded to nearest: as they stand they take minutes."""
    monkeypatch.chdir(tmp_path)
    record = tfmq_fx.CalibrationSet.record
    few = {"num_samples": 2, "num_inference_steps": 2}
    monkeypatch.setattr(
        tfmq_fx.CalibrationSet, "record", staticmethod(lambda pipe, **kw: record(pipe, **{**kw, **few}))
    )
    quick = dataclasses.replace(PRESETS["w4a8"], reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    monkeypatch.setitem(PRESETS, "w4a8", quick)
    namespace = {"pipe": embedded_pipeline()}
    namespace["pipe"].set_progress_bar_config(disable=True)
    blocks = blocks_of(README.read_text())
    assert len(blocks) == 2
    for block in blocks[:number]:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["pipe"].unet.report["recipe"]["weight_bits"] == 4
    assert (tmp_path / "net.onnx").is_file() == (number == 2)


@pytest.mark.parametrize("file", PAGES, ids=page_name)
def test_what_the_page_names_exists(file):
    text = file.read_text()
    assert broken_links(file) == []
    assert foreign_imports(text) == []
    assert missing_modules(text) == []
    for command in commands_of(text):
        parse(command)


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/zoo/README.md"])
def test_the_links_of_the_other_pages_lead_somewhere(name):
    assert broken_links(ROOT / name) == []


def test_the_readme_takes_two_minutes():
    assert len(README.read_text().split()) <= MAX_WORDS


def test_the_readme_has_the_command_that_ci_runs():
    assert any(line.startswith("make test") for line in README.read_text().splitlines())
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    for page in PAGES[1:]:
        assert page == DOCS / "README.md" or f"({page.relative_to(DOCS)})" in index, page


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b=1`, c\n[a](#a-b1-c) [b](#no) [c](gone.md) [d](page.md#a-b1-c) [e](page.md#a) [f](https://x.org/y)\n"
        "```\n[g](gone.md)\n# no\n```\n"
    )
    assert broken_links(page) == ["#no", "gone.md", "page.md#a"]
    for line in ("from tests import small", "import tests.small", "from benchmarks.networks.small import TinyUNet",
                 "from benchmarks import networks"):  # fmt: skip
        assert foreign_imports(f"```python\nimport benchmarks.ablation\n{line}\n```\n"), line
    assert missing_modules("benchmarks.quality benchmarks.no tfmq_fx.no tfmq_fx.recipe.Recipe tfmq_fx.cli.no") == [
        "benchmarks.no", "tfmq_fx.cli.no", "tfmq_fx.no",
    ]  # fmt: skip
    text = "```\ntfmq quantize out/q \\\n --recipe w4a8   # a comment\n```\n    tfmq report out/q\n"
    assert commands_of(text) == [["quantize", "out/q", "--recipe", "w4a8"], ["report", "out/q"]]
    parse(commands_of(text)[0])
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        parse(["quantize", "out/q", "--nothing"])


def test_the_docstrings_render_as_pages(tmp_path):
    pages = {str(p.relative_to(tmp_path)): p.read_text() for p in write(tmp_path)}
    assert "tfmq_fx/calibration/data.html" in pages
    for name in tfmq_fx.__all__:
        assert any(f'id="{name}"' in page or f"/{name}.html" in page for page in pages.values()), name
    assert "one trajectory per sample" in pages["tfmq_fx/calibration/data.html"]
