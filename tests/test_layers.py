"""The house rules that a reader cannot see at a glance: who may import whom, and no architecture's name."""

import ast
import re
from pathlib import Path

import diffusers
import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    [
        "tfmq_fx.errors",
        "tfmq_fx._torchao",
        "tfmq_fx.arguments",
        "tfmq_fx.arithmetic",
        "tfmq_fx.graph",
        "tfmq_fx.progress",
        "tfmq_fx.metrics",
    ],
    ["tfmq_fx.observers"],
    ["tfmq_fx.recipe"],
    ["tfmq_fx.passes"],
    [
        "tfmq_fx.capture",
        "tfmq_fx.calibration",
        "tfmq_fx.reconstruction",
        "tfmq_fx.graph_json",
        "tfmq_fx.model",
        "tfmq_fx.saving",
    ],
    ["tfmq_fx.pipeline", "tfmq_fx.demo", "tfmq_fx.sampling"],
    ["tfmq_fx.cli", "tfmq_fx.__init__"],
]
FILES = {
    **{f"tfmq_fx.{p.stem}": p for p in (ROOT / "tfmq_fx").glob("*.py")},
    **{f"tfmq_fx.{room}.{p.stem}": p for room in ("passes", "observers") for p in (ROOT / room).glob("*.py")},
}


def level(module):
    matches = [
        i
        for i, names in enumerate(LEVELS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return matches[0] if matches else None


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_run_downhill(module):
    assert level(module) is not None, f"{module} has no level"
    for node in ast.parse(FILES[module].read_text()).body:  # top-level imports: the layering
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tfmq_fx"):
            target = level(node.module)
            if node.module == "tfmq_fx":
                assert module.endswith("__init__"), f"{module} imports from the face"
            else:
                assert target is not None
                assert target <= level(module), f"{module} imports {node.module}"


def test_torch_aos_private_names_have_one_home():
    for module, path in FILES.items():
        if module != "tfmq_fx._torchao":
            assert not re.search(r"^\s*(from|import) torch(ao|\.ao)", path.read_text(), re.M), module


def test_no_architecture_is_named_anywhere():
    names = {
        n
        for n in dir(diffusers)
        if n.endswith(("2DModel", "3DModel", "ConditionModel", "Transformer2DModel"))
    }
    words = names | {
        "time_emb_proj",
        "time_embedding",
        "resnets",
        "TimestepBlock",
        "down_blocks",
        "transformer_blocks",
    }
    for module, path in FILES.items():
        tree = ast.parse(path.read_text())
        strings = {
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        code = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
        }
        assert not (words & (strings | code)), (module, words & (strings | code))
