"""Where tests lie: a module's under its name in its room's folder, what several share in no test file."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py"))
# Of no module: the behaviours of the whole, what tests share, and what is said of the repository.
WHOLE = {"tests/whole", "tests/helpers"}
HELPERS = {f.removesuffix(".py").replace("/", ".") for f in TESTS if f.startswith("tests/helpers/")}
REPOSITORY = {f"tests/test_{name}.py" for name in ("docs", "layers", "packaging", "tests")}


def module_of(test):
    """The file that a test file is named after: `tests/<room>/test_<x>.py` is of `<x>.py` in that room."""
    folder, name = test.removeprefix("tests/").rpartition("test_")[::2]
    home = "" if folder.startswith(("passes/", "observers/")) else "tfmq_fx/"
    return f"{home}{folder}{name}"


def strays(tests, exists):
    """Test files of rooms that are named after no module there. exists: path -> is there such a file?"""
    return [
        test
        for test in tests
        if test.rpartition("/")[2].startswith("test_")
        and test.rpartition("/")[0] not in WHOLE
        and test not in REPOSITORY
        and not exists(module_of(test))
    ]


def taken_from_tests(source):
    """The test files that a file imports, or imports from: anywhere in it, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = node.module or "tests"
            submodules = [] if folder in HELPERS else [f"{folder}.{alias.name}" for alias in node.names]
            modules = [folder, *submodules]
        else:
            continue
        yield from (m for m in modules if m.rpartition(".")[2].startswith("test_"))


def test_each_is_named_after_a_module_of_its_room():
    assert strays(TESTS, lambda path: (ROOT / path).is_file()) == []


def test_none_imports_from_another():
    assert {
        path: found for path in TESTS if (found := list(taken_from_tests((ROOT / path).read_text())))
    } == {}


def test_a_stray_and_an_import_hidden_in_a_function_are_seen():
    there = {"tfmq_fx/base/files.py", "passes/int8/fold_weights.py", "tfmq_fx/cli.py"}
    good = [
        "tests/base/test_files.py", "tests/passes/int8/test_fold_weights.py", "tests/test_cli.py",
        "tests/whole/test_anything.py", "tests/helpers/files.py", "tests/conftest.py", "tests/test_docs.py",
    ]  # fmt: skip
    bad = ["tests/graph/test_files.py", "tests/passes/test_fold_weights.py", "tests/test_anything.py"]
    assert strays(good + bad, there.__contains__) == bad
    assert strays(good, lambda _: False) == good[:3]
    for line in (
        "from tests.base.test_files import run", "import tests.base.test_files", "from tests.base import test_files",
        "def f():\n    from tests.test_cli import run", "import test_files",
    ):  # fmt: skip
        assert list(taken_from_tests(line)), line
    assert not list(
        taken_from_tests("from tests.helpers.processes import test_mode\nimport tests.helpers.processes")
    )
