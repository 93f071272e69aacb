"""A graph as JSON, which can only name tensor operators."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import tfmq_fx
from tests.helpers.artefacts import edit
from tfmq_fx.artefact.graph_json import graph_from_json, graph_to_json, tensors_of
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


def test_a_graph_without_an_output_is_refused(folder):
    edit(folder / GRAPH, lambda graph: graph["nodes"].pop())
    _rehash(folder)
    with pytest.raises(TFMQError, match=r"graph\.json: a graph has one output, and this one has none"):
        tfmq_fx.load(folder)


class OfSizes(nn.Module):
    """Scaled by roots and sums of its sizes."""

    def forward(self, sample, timestep):
        rows, width = sample.shape[0], sample.shape[2]
        return sample * np.sqrt(rows) / (rows + width) + timestep.view(-1, 1, 1) * np.sqrt(width)


def test_a_graph_names_arithmetic_of_sizes():
    gm = tfmq_fx.capture(OfSizes().eval(), {"sample": torch.randn(2, 4, 6), "timestep": torch.tensor([1, 2])})
    again = graph_from_json(json.loads(json.dumps(graph_to_json(gm))), tensors_of(gm))
    assert "sym_sqrt" in str([n.target for n in again.graph.nodes])
    for rows in (1, 5):
        x, t = torch.randn(rows, 4, 6), torch.arange(rows)
        assert torch.equal(again(x, t), OfSizes()(x, t))
