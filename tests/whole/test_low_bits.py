"""Smoothing, rotation and low-rank branches in turn, from the float graph to the saved model."""

from functools import partial

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, TinyUNet, calibration, captured, make, prepared
from benchmarks.networks.zoo import ZOO
from tests.helpers.low_bits import edges
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.stage import input_maxima
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import attribute, fresh
from tfmq_fx.graph.state import Captured, captured_of, set_state
from tfmq_fx.passes import PassManager, find_temporal, inline_modules, low_rank, rotate, smooth
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.pipeline import low_bits

ALL = {"smooth": 0.5, "rotate": 4, "low_rank": 2}
BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]
ENTRIES = {e.name: e for e in ZOO}


def tensors(entry, rows):
    """The entry's own example, its rows repeated: another batch size than the capture's."""
    found = {n: x for n, (_, x) in leaves(entry.inputs(False)).items() if isinstance(x, torch.Tensor)}
    return {n: torch.cat([x, x.flip(0)])[:rows] for n, x in found.items()}


@pytest.mark.parametrize("name", ["dit", "pixart-512", "latent-diffusion"])
def test_the_zoo_computes_the_same_after_all_three(name):
    entry = ENTRIES[name]
    torch.manual_seed(0)
    gm = tfmq_fx.capture(entry.build(False), entry.inputs(False), timestep=entry.timestep)
    temporal, first_and_last = find_temporal(gm), edges(gm)
    data = tfmq_fx.CalibrationSet.from_tensors(tensors(entry, 4), timestep=entry.timestep)
    passes = low_bits(tfmq_fx.Recipe(**ALL), temporal=temporal, calibration=data)
    got = PassManager(passes)(fresh(gm)).graph_module
    assert find_temporal(got) == temporal
    assert edges(got) == first_and_last
    batch = tensors(entry, 3)
    inputs = [batch[n] for n in placeholders(gm)]
    with torch.no_grad():
        for a, b in zip(_leaves(got(*inputs)), _leaves(gm(*inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    folded = [c.name for p in ("smooth", "rotate") for c in captured_of(got).low_bits[p] if c.how == "folded"]
    assert len(folded) >= 4


def _leaves(output):
    return torch.utils._pytree.tree_leaves(output)


def test_a_graph_without_shapes_gets_nodes_of_its_own():
    gm = torch.fx.symbolic_trace(make(TinyUNet))
    inline_modules(gm)
    set_state(gm, Captured(timestep="timestep"))
    with torch.no_grad():
        expected = gm(X, T)
        for step in (lambda g: rotate(g, block=4), lambda g: low_rank(g, rank=2)):
            step(gm)
            torch.testing.assert_close(gm(X, T), expected, rtol=1e-5, atol=1e-5)
    assert {c.how for c in captured_of(gm).low_bits["rotate"]} == {"explicit", "left"}


def test_the_order_of_the_three_is_checked():
    maxima = input_maxima(captured(), calibration())
    with pytest.raises(TFMQError, match="smooth must come before rotate"):
        PassManager([rotate, partial(smooth, maxima=maxima)])(captured())


def test_a_recipe_whose_passes_have_not_run_says_so():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(rotate=4), timesteps=TIMESTEPS)
    assert [(n.name, n.reason) for n in state_of(gm).plan.notes] == [
        ("rotate", "Recipe.rotate is set, but passes.rotate has not run; see pipeline.stages")
    ]


@pytest.fixture(scope="module")
def model():
    recipe = tfmq_fx.Recipe(weight_bits=3, activation_bits=4, reconstruction=FAST, **ALL)
    return tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration(), seed=0, strict=True)


def test_blocks_are_the_same_and_reconstruction_still_helps(model):
    results = {r["name"]: r for r in model.report["reconstruction"]}
    plain = tfmq_fx.quantize(
        make(TinyUNet),
        tfmq_fx.Recipe(weight_bits=3, activation_bits=4, reconstruction=FAST),
        calibration=calibration(),
    )
    assert results.keys() == {r["name"] for r in plain.report["reconstruction"]}
    assert all(r["error"] <= r["error_nearest"] for r in results.values())
    better = [n for n, r in results.items() if r["error"] < 0.95 * r["error_nearest"]]
    assert len(better) >= 4
    at = lambda q: sum(e["output_relative_mse"] for e in q.report["errors_by_timestep"])  # noqa: E731
    assert at(model) < at(plain)


def test_branches_are_floats_that_were_chosen_and_are_counted(model):
    changes = model.report["low_bits"]
    split_ = [c for c in changes["low_rank"] if c["tensors"]]
    branches = [f for f in model.report["float"] if f["reason"].startswith("low-rank branch")]
    assert len(branches) == 2 * len(split_) > 0
    assert all(f["chosen"] for f in branches)
    read = {t: attribute(model.network, t) for name in changes for c in changes[name] for t in c["tensors"]}
    assert model.report["sizes"]["low_bits_bytes"] == sum(x.numel() * x.element_size() for x in read.values())
    assert {x.dtype for t, x in read.items() if "low_rank" in t} == {torch.float16}
    assert {layer["path"] for layer in model.report["layers"]} == {
        layer.path for layer in state_of(prepared()).plan.layers
    }


@pytest.mark.slow
def test_it_compiles(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X[:3], T[:3]), model(X[:3], T[:3]))


def test_it_saves_loads_and_exports(model, tmp_path):
    model.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    model.export(tmp_path / "q.pt2")
    program = torch.export.load(tmp_path / "q.pt2").module()
    with torch.no_grad():
        expected = model(X[:3], T[:3])
        assert torch.equal(loaded(X[:3], T[:3]), expected)
        assert torch.equal(program(sample=X[:3], timestep=T[:3]), expected)


class Learned(TinyUNet):
    """What it adds to the sample is computed of learned tokens alone, and not only by a layer."""

    def __init__(self):
        super().__init__()
        self.tokens, self.query = torch.nn.Parameter(torch.randn(1, 1, 8, 8)), torch.nn.Linear(8, 8)

    def forward(self, sample, timestep):
        return super().forward(sample + self.query(self.tokens) + self.tokens, timestep)


def test_a_smoothing_that_converting_folds_takes_no_bytes(tmp_path):
    recipe = tfmq_fx.Recipe(
        weight_bits=8, smooth=0.5, reconstruction=tfmq_fx.Reconstruction(method="nearest")
    )
    network = make(Learned)
    q = tfmq_fx.quantize(network, recipe, calibration=calibration())
    (change,) = [c for c in q.report["low_bits"]["smooth"] if c["name"] == "query.weight"]
    assert change["how"] == "explicit"
    assert not any(n in name for n in change["tensors"] for name in q.network.state_dict())
    assert q.report["sizes"]["low_bits_bytes"] == sum(
        q.network.state_dict()[n].nbytes
        for c in q.report["low_bits"]["smooth"]
        for n in c["tensors"]
        if n in q.network.state_dict()
    )
    with torch.no_grad():
        expected = network(X, T)
    assert (q(X, T) - expected).norm() / expected.norm() < 0.07  # as in tests/whole/test_moving_sizes.py
    q.save_pretrained(tmp_path)
    assert torch.equal(tfmq_fx.load(tmp_path)(X, T), q(X, T))
