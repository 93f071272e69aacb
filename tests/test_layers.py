"""The house rules that a reader cannot see at a glance: who may import whom, and no architecture's name."""

import ast
import re
from pathlib import Path

import diffusers
import pytest

from tests.zoo import ZOO

ROOT = Path(__file__).parent.parent
LEVELS = [
    [
        "tfmq_fx.errors",
        "tfmq_fx._torchao",
        "tfmq_fx.arguments",
        "tfmq_fx.arithmetic",
        "tfmq_fx.channels",
        "tfmq_fx.onednn",
        "tfmq_fx.origins",
        "tfmq_fx.graph",
        "tfmq_fx.progress",
        "tfmq_fx.metrics",
        "tfmq_fx.extractors",
        "tfmq_fx.parallel",
    ],
    ["tfmq_fx.observers"],
    ["tfmq_fx.recipe"],
    ["tfmq_fx.passes"],
    [
        "tfmq_fx.capturing",
        "tfmq_fx.temporal",
        "tfmq_fx.recording",
        "tfmq_fx.calibration",
        "tfmq_fx.gptq",
        "tfmq_fx.spill",
        "tfmq_fx.rounding",
        "tfmq_fx.tuning",
        "tfmq_fx.resume",
        "tfmq_fx.reconstruction",
        "tfmq_fx.graph_json",
        "tfmq_fx.maintenance",
        "tfmq_fx.model",
        "tfmq_fx.diffusers_quantizer",
        "tfmq_fx.saving",
        "tfmq_fx.coverage",
        "tfmq_fx.lowering_openvino",
        "tfmq_fx.lowering_torch",
        "tfmq_fx.lowering",
        "tfmq_fx.exporting",
        "tfmq_fx.export_onnx",
        "tfmq_fx.export_aot",
    ],
    ["tfmq_fx.pipeline", "tfmq_fx.demo", "tfmq_fx.sampling", "tfmq_fx.inspection", "tfmq_fx.presets"],
    ["tfmq_fx.bit_widths", "tfmq_fx.drift", "tfmq_fx.report"],
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
    """No class, file or module path of a network, in code, strings or comments: dataflow decides."""
    classes = {n for n in dir(diffusers) if n.endswith(("Model", "UNet")) and not n.startswith("Auto")}
    models = Path(diffusers.__file__).parent / "models"
    files = {p.stem for p in models.rglob("*.py") if "_" in p.stem.strip("_")} - {"model_loading_utils"}
    modules = {part for e in ZOO for path in e.layers for part in path.split(".") if "_" in part}
    assert {"UNet2DConditionModel", "FluxTransformer2DModel"} <= classes
    assert {"unet_2d_condition", "transformer_flux"} <= files
    assert {"time_emb_proj", "adaln_single", "emb_layers"} <= modules
    words = classes | files | modules | {"resnets", "TimestepBlock", "down_blocks", "transformer_blocks"}
    for module, path in FILES.items():
        found = words & set(re.findall(r"\w+", path.read_text()))
        assert not found, (module, found)
