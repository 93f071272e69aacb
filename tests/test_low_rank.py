import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, TinyUNet, calibration, captured, make, prepared
from benchmarks.networks.zoo import ZOO
from tests.low_bits import Shared, done, graph, operators, run
from tests.test_reconstruction import weights_of
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.stage import input_maxima
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import attribute, edge_layers, fresh
from tfmq_fx.passes import PassManager, find_temporal, inline_modules, low_rank, rotate, smooth
from tfmq_fx.passes.low_bits.low_rank import _rounding_error
from tfmq_fx.passes.quantize.find_blocks import find_blocks
from tfmq_fx.pipeline import low_bits

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]
ALL = {"smooth": 0.5, "rotate": 4, "low_rank": 2}
ENTRIES = {e.name: e for e in ZOO}


def split(gm, image=False, **changes):
    """A copy with branches, checked for what holds of each: same function, same block, the original as it was."""
    before = {n: p.clone() for n, p in gm.named_parameters()}
    expected = run(gm, image)
    got = low_rank(fresh(gm), **{"rank": 1, **changes}).graph_module
    torch.testing.assert_close(run(got, image), expected)
    assert find_temporal(got) == find_temporal(gm)
    assert edges(got) == edges(gm)
    assert all(torch.equal(p, before[n]) for n, p in gm.named_parameters())
    return got


def edges(gm):
    return {n.name for n in edge_layers(gm, timestep=find_temporal(gm).timestep)}


def linears():
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))


def test_a_branch_stands_beside_its_layer_in_half_precision():
    gm = graph(linears)
    w = attribute(gm, "body.0.weight").detach().clone()
    got = split(gm, rank=2)
    branch = ["linear", "to", "to", "linear", "linear", "add"]
    assert operators(got) == [*branch, "silu", *branch, "linear"]
    l1, l2 = (attribute(got, f"body.0.weight_low_rank_{i}") for i in (1, 2))
    assert (l1.dtype, l1.shape, l2.dtype, l2.shape) == (torch.float16, (16, 2), torch.float16, (2, 8))
    rest = attribute(got, "body.0.weight").detach()
    torch.testing.assert_close(rest + l1.float() @ l2.float(), w)
    s = torch.linalg.svdvals(w)
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:6], s[2:], rtol=1e-2, atol=1e-3)


def test_a_convolutions_branch_has_its_stride_padding_and_dilation():

    def body():
        return nn.Sequential(
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, (3, 1), padding="same", dilation=(2, 1), bias=False),
        )

    got = split(graph(body, image=True), image=True, rank=2)
    assert attribute(got, "body.1.weight_low_rank_2").shape == (2, 8, 3, 1)
    assert attribute(got, "body.1.weight_low_rank_1").shape == (8, 2, 1, 1)


def test_of_weight_and_error_the_better_one_is_taken():
    gm = graph(linears)
    left = {}
    for bits in (None, 2, 8):
        got = split(gm, rank=1, bits=bits)
        rest = attribute(got, "body.2.weight").detach().double()
        left[bits] = [_rounding_error(rest, b).norm().item() for b in (2, 8)]
    assert left[2][0] <= left[None][0]
    assert left[8][1] <= left[None][1]


def test_what_has_no_branch_is_left_and_says_why():

    def body():
        return nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 1))

    got = split(graph(body, image=True), image=True, rank=4)
    assert set(done(got, "low_rank").values()) == {"left"}
    assert [c.reason for c in got.meta["low_rank"] if c.reason != "first or last layer"] == [
        "a grouped conv2d has no branch of this form",
        "a conv_transpose2d has no branch of this form",
        "a branch of rank 4 would hold 64 numbers, the weight has 64",
    ]
    assert [c.how for c in split(graph(Shared)).meta["low_rank"] if "own" in c.reason] == ["left", "left"]


def test_a_second_time_changes_nothing():
    got = split(graph(linears))
    nodes = [n.format_node() for n in got.graph.nodes]
    assert not low_rank(got, rank=3).modified
    assert [n.format_node() for n in got.graph.nodes] == nodes


def test_ranks_and_graphs_that_make_no_sense_are_refused():
    with pytest.raises(TFMQError, match="rank=0: is not positive"):
        low_rank(graph(linears), rank=0)
    with pytest.raises(TFMQError, match="low_rank: the graph is calibrated already"):
        low_rank(prepared())


# ---- the three in turn


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
    got = low_bits(gm, tfmq_fx.Recipe(**ALL), temporal=temporal, calibration=data)
    assert find_temporal(got) == temporal
    assert edges(got) == first_and_last
    batch = tensors(entry, 3)
    inputs = [batch[n] for n in placeholders(gm)]
    with torch.no_grad():
        for a, b in zip(_leaves(got(*inputs)), _leaves(gm(*inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    folded = [c.name for p in ("smooth", "rotate") for c in got.meta[p] if c.how == "folded"]
    assert len(folded) >= 4


def _leaves(output):
    return torch.utils._pytree.tree_leaves(output)


def test_a_graph_without_shapes_gets_nodes_of_its_own():
    gm = torch.fx.symbolic_trace(make(TinyUNet))
    inline_modules(gm)
    gm.meta["timestep"] = "timestep"
    with torch.no_grad():
        expected = gm(X, T)
        for step in (lambda g: rotate(g, block=4), lambda g: low_rank(g, rank=2)):
            step(gm)
            torch.testing.assert_close(gm(X, T), expected, rtol=1e-5, atol=1e-5)
    assert {c.how for c in gm.meta["rotate"]} == {"explicit", "left"}


def test_the_order_of_the_three_is_checked():
    maxima = input_maxima(captured(), calibration())
    with pytest.raises(TFMQError, match="smooth must come before rotate"):
        PassManager([rotate, partial(smooth, maxima=maxima)])(captured())


def test_a_recipe_whose_passes_have_not_run_says_so():
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(rotate=4), timesteps=TIMESTEPS)
    assert [(n.name, n.reason) for n in gm.meta["plan"].notes] == [
        ("rotate", "Recipe.rotate is set, but passes.rotate has not run; see pipeline.low_bits")
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


def test_blocks_hold_the_same_layers():
    temporal = find_temporal(captured())
    gm = low_bits(captured(), tfmq_fx.Recipe(**ALL), temporal=temporal, calibration=calibration())
    kept = lambda paths: [p for p in paths if "low_rank" not in p]  # noqa: E731
    found = tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    assert sorted(kept(weights_of(b)) for b in find_blocks(found) if kept(weights_of(b))) == sorted(
        weights_of(b) for b in find_blocks(prepared())
    )


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
        layer.path for layer in prepared().meta["plan"].layers
    }


def test_it_saves_loads_exports_and_compiles(model, tmp_path):
    model.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    model.export(tmp_path / "q.pt2")
    program = torch.export.load(tmp_path / "q.pt2").module()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(X[:3], T[:3])
        assert torch.equal(loaded(X[:3], T[:3]), expected)
        assert torch.equal(program(sample=X[:3], timestep=T[:3]), expected)
        torch.testing.assert_close(compiled(X[:3], T[:3]), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"smooth": 2.0}, "not between 0 and 1"),
        ({"rotate": 12}, "not a power of two"),
        ({"low_rank": 0}, "not positive"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change, words):
    with pytest.raises(TFMQError, match=rf"Recipe\.{next(iter(change))}: .*{words}"):
        dataclasses.replace(tfmq_fx.Recipe(), **change)
