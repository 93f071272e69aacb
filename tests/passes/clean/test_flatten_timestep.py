"""A timestep of shape (N, 1) is one of (N,) in the graph, and what is made from it takes both."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import tfmq_fx
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import meta_value
from tfmq_fx.passes.clean.flatten_timestep import flatten_timestep


class Column(nn.Module):
    """A network for tables, as flow matching writes them: the time is a column beside the features."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 8))
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, timestep):
        return self.b((self.a(x) + self.time(timestep / 1000)).relu())


X, T = (
    torch.randn(40, 8, generator=torch.Generator().manual_seed(0)),
    torch.arange(0.0, 1000.0, 100.0).repeat(4)[:, None],
)


def test_it_reshapes_what_it_takes():
    network = Column().eval()
    example = {"x": X[:2], "timestep": T[:2]}
    gm = torch.export.export(
        network, (), example, strict=False, dynamic_shapes={n: {0: torch.export.Dim.AUTO} for n in example}
    ).module()
    before = [n.name for n in gm.graph.nodes]
    result = flatten_timestep(gm, timestep="timestep")
    assert result.modified
    after = list(gm.graph.nodes)
    assert [n.name for n in after if n.name in before] == before
    (new,) = (n for n in after if n.name not in before)
    assert new.target is torch.ops.aten.reshape.default
    assert new.args[1] == [-1, 1]
    assert meta_value(placeholders(gm)["timestep"]).dim() == 1
    assert not flatten_timestep(gm, timestep="timestep").modified
    with torch.no_grad():
        bare = torch.fx.Interpreter(gm)  # the exported module's own call checks shapes
        for t in (T[:3], T[:3, 0]):
            (y,) = pytree.tree_leaves(bare.run(X[:3], t))
            assert torch.equal(y, network(X[:3], T[:3]))
    with pytest.raises(TFMQError, match="'sigma'"):
        flatten_timestep(gm, timestep="sigma")


def test_quantized_lowered_saved_and_precomputed(tmp_path):
    network = Column().eval()
    data = tfmq_fx.CalibrationSet.from_tensors({"x": X, "timestep": T})
    assert data.tensors["timestep"].shape == (40,)
    nearest = tfmq_fx.Recipe(weight_bits=8, reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    q = tfmq_fx.quantize(network, nearest, calibration=data)
    q.save_pretrained(tmp_path / "q")
    tables = tfmq_fx.precompute(network, example={"x": X[:2], "timestep": T[:2]}, timesteps=T[:10, 0])
    with torch.no_grad():
        expected = q(X, T)
        assert 0 < (expected - network(X, T)).norm() < 0.05 * network(X, T).norm()  # 8 bits: 1% and less
        for other in (q, tfmq_fx.load(tmp_path / "q")):
            assert torch.equal(other(X, T[:, 0]), expected)
        assert torch.equal(tables(X, T), network(X, T))
        with pytest.raises(
            TFMQError, match=r"timestep: has shape \(40, 2\), but must have one value per sample"
        ):
            q(X, T.expand(40, 2))


def test_one_per_token_stays_as_it_is():
    gm = tfmq_fx.capture(
        Column().eval(), {"x": X[:2, None].expand(2, 4, 8), "timestep": T[:2, None].expand(2, 4, 1)}
    )
    assert not flatten_timestep(gm, timestep="timestep").modified
    assert meta_value(placeholders(gm)["timestep"]).dim() == 3
