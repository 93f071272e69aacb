"""The network as torch.export's program."""

import subprocess
import sys
from collections import Counter

import torch
from torch import nn

from benchmarks.networks.small import ScalarTime, calibration
from tests.helpers.nearest import one_timestep
from tfmq_fx.artefact import program
from tfmq_fx.graph.nodes import mutated_inputs, set_buffer

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]


def test_a_pt2_gives_the_same_numbers_without_this_library(tiny, tmp_path):
    tiny.export(tmp_path / "net.pt2")
    torch.save({"sample": X, "timestep": T}, tmp_path / "inputs.pt")
    code = (
        "import torch; from torch.ao.quantization.fx import _decomposed; import sys;"
        "assert not any(m.startswith('tfmq') for m in sys.modules);"
        "i = torch.load('inputs.pt'); y = torch.export.load('net.pt2').module()(**i);"
        "torch.save(y.detach(), 'y.pt')"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True
    )
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), tiny(X, T))


def targets(gm):
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


@torch.no_grad()
def test_a_flat_graph_is_what_torch_export_traces(tiny):
    before = str(tiny.network.graph), {name: x.clone() for name, x in tiny.state_dict().items()}
    flat, traced = program.flat_graph(tiny), program.graph_of(program.exported(tiny))
    assert not flat.graph.find_nodes(op="call_module")
    expected = targets(traced)
    expected.pop("aten._assert_tensor_metadata.default")
    assert targets(flat) == expected
    for size in (1, 2, 5):
        assert torch.equal(flat(X[:size], T[:size])[0], tiny(X[:size], T[:size]))
    set_buffer(flat, "temporal_block.timestep_table", torch.zeros(10))  # passes write to it
    assert str(tiny.network.graph) == before[0]
    assert all(torch.equal(x, before[1][name]) for name, x in tiny.state_dict().items())


def test_a_graph_that_writes_to_its_buffers_is_traced():
    """A trace replaces the writes; whether two readers see one is not seen node by node."""

    class Counts(ScalarTime):
        def __init__(self):
            super().__init__()
            self.calls = nn.Buffer(torch.zeros(()))

        def forward(self, sample, timestep):
            self.calls.add_(1)
            return super().forward(sample, timestep) + self.calls

    q = one_timestep(Counts)
    assert any(mutated_inputs(n) for n in q.network.graph.nodes)
    assert not any(
        mutated_inputs(n) for n in program.flat_graph(q).graph.nodes if "copy_" not in str(n.target)
    )
