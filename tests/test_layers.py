"""The house rules that a reader cannot see at a glance: who may import whom, and no architecture's name."""

import ast
import re
import tomllib
from pathlib import Path

import diffusers
import pytest

from benchmarks.networks.zoo import ZOO

ROOT = Path(__file__).parent.parent
# From the ground up: a file imports from its own room and from those before it. A room is a folder, or a file beside them.
ROOMS = (
    "base", "graph", "observers", "recipe", "settings",
    "passes.pass_manager", "passes.clean", "passes.temporal", "passes.low_bits", "passes.quantize", "passes.int8", "passes",
    "artefact", "calibration", "capturing", "reconstruction", "maintenance", "runtimes", "evaluation", "choices",
    "model", "precomputing", "pipeline", "diffusers_quantizer", "demo", "inspection", "bit_widths", "report", "options", "cli", "__init__",
)  # fmt: skip


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "tfmq_fx" else ("tfmq_fx", *parts)
    return ".".join(parts if len(parts) == 2 else (p for p in parts if p != "__init__"))


FILES = {
    name_of(p): p
    for top in ("tfmq_fx", "passes", "observers")
    for p in sorted((ROOT / top).rglob("*.py"))
    if not {"passes", "observers"} & set(p.relative_to(ROOT / top).parts)  # committed links
}


def room_of(module):
    """The longest room that the module lies in."""
    inside = module.removeprefix("tfmq_fx.")
    found = [room for room in ROOMS if inside == room or inside.startswith(f"{room}.")]
    return max(found, key=len) if found else None


def imports_of(source, known):
    """The modules of `known` that a file imports: anywhere in it, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in submodules)


def graph_of(files):
    """module -> the modules that it imports; `files`: module -> source."""
    return {
        module: {m for m in imports_of(source, files) if m in files} - {module}
        for module, source in files.items()
    }


def circle_in(graph):
    """The modules on one circle of imports, in its order; [] where there is none."""
    done: set[str] = set()

    def walk(module, trail):
        if module in trail:
            return trail[trail.index(module) :]
        if module not in done:
            for other in sorted(graph[module]):
                if found := walk(other, [*trail, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def climbing(graph):
    """The imports that go up: from a room to one above it."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]


GRAPH = graph_of({name: path.read_text() for name, path in FILES.items()})


def test_every_file_has_a_room():
    assert not [name for name in FILES if room_of(name) is None]
    assert {room_of(name) for name in FILES} == set(ROOMS)


def test_no_import_goes_up():
    assert climbing(GRAPH) == []


def test_no_circle():
    assert circle_in(GRAPH) == []
    rooms = {
        room: {room_of(m) for name, others in GRAPH.items() if room_of(name) == room for m in others} - {room}
        for room in ROOMS
    }
    assert circle_in(rooms) == []


def test_no_file_imports_from_the_face():
    assert not [name for name, others in GRAPH.items() if "tfmq_fx.__init__" in others]
    for name, path in FILES.items():
        assert not re.search(
            r"^\s*(import tfmq_fx$|from tfmq_fx import)", path.read_text(), re.M
        ) or name.endswith("__init__"), name


def test_a_circle_hidden_in_a_function_and_a_climb_are_seen():
    """What the house looked like before it had rooms: `model` imported what imports it, inside its methods."""
    files = {
        "tfmq_fx.model": "def export(self):\n    from tfmq_fx.runtimes.exporting import export",
        "tfmq_fx.runtimes.exporting": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tfmq_fx.model import QuantizedModel",
    }
    graph = graph_of(files)
    assert circle_in(graph) == ["tfmq_fx.model", "tfmq_fx.runtimes.exporting"]
    assert climbing(graph) == ["tfmq_fx.runtimes.exporting imports tfmq_fx.model"]


def test_every_folder_of_the_package_is_listed_for_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name_of(p).removesuffix(".__init__") for p in FILES.values() if p.name == "__init__.py"}
    assert set(settings["packages"]) == folders
    assert settings["package-dir"] == {
        "tfmq_fx": "tfmq_fx", "tfmq_fx.passes": "passes", "tfmq_fx.observers": "observers"
    }  # fmt: skip


def test_torch_aos_private_names_have_one_home():
    for module, path in FILES.items():
        if module != "tfmq_fx.base._torchao":
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


@pytest.mark.parametrize(
    "name", ["capture", "quantize", "prepare", "convert", "mixed_precision", "load", "precompute"]
)
def test_no_submodule_takes_the_name_of_a_public_function(name):
    assert f"tfmq_fx.{name}" not in FILES
