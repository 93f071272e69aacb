"""A graph as JSON, which can only name tensor operators."""

import pytest

import tfmq_fx
from tests.helpers.artefacts import edit
from tfmq_fx.artefact.saving import CONFIG, GRAPH
from tfmq_fx.base.errors import TFMQError


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "q")
    return tmp_path / "q"


def _rehash(folder):
    import hashlib

    digest = hashlib.sha256((folder / GRAPH).read_bytes()).hexdigest()
    edit(folder / CONFIG, lambda c: c["quantization_config"]["sha256"].update({GRAPH: digest}))


@pytest.mark.parametrize(
    "target", ["os.system", "aten.from_file.default", "builtins.eval", "aten.nothing.default", "prims.x.y"]
)
def test_a_graph_can_only_name_tensor_operators(folder, target):
    def change(graph):
        next(n for n in graph["nodes"] if n["op"] == "call_function")["target"] = target

    edit(folder / GRAPH, change)
    _rehash(folder)
    with pytest.raises(TFMQError, match=f"operator '{target}' is unknown .* or not allowed"):
        tfmq_fx.load(folder)
