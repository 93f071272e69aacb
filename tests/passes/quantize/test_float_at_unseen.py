"""The float temporal block, kept for timesteps that the table lacks."""

import dataclasses
import functools

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import (
    TIMESTEPS,
    Labelled,
    ScalarTime,
    TinyUNet,
    calibration,
    captured,
    labelled_data,
    make,
    vectors,
)
from tests.helpers.lowered import assert_same_but_for_ties, lower, noise
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes import extract_temporal, find_temporal, float_at_unseen
from tfmq_fx.passes.quantize.prepare import prepare

RECIPE = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
# A table's value, values between two, one beyond all, and its nearest neighbour.
T = torch.tensor([400, 449, 451, 5000, 900, 1])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@functools.cache
def quantized(unseen="float", maintain="reconstruct"):
    recipe = dataclasses.replace(RECIPE, unseen=unseen, maintain=maintain)
    return tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration())


@functools.cache
def float_block():
    gm = captured()
    return extract_temporal(gm, find_temporal(gm))


def unseen(t):
    return ~(t[:, None] == TIMESTEPS).any(1)


@pytest.mark.parametrize("maintain", ["reconstruct", "cache"])
@torch.no_grad()
def test_a_feature_is_the_float_one_where_the_table_lacks_the_timestep(maintain):
    got, nearest = (quantized(u, maintain).temporal_block(T) for u in ("float", "nearest"))
    new = unseen(T)
    assert new.tolist() == [False, True, True, True, False, True]
    for a, b, exact in zip(got, nearest, float_block()(T), strict=False):
        assert torch.equal(a[~new], b[~new])
        assert torch.equal(a[new], exact[new])
        assert not torch.equal(a[~new], exact[~new])  # the control: quantized features are not float ones


@pytest.mark.parametrize("maintain", ["reconstruct", "cache"])
@torch.no_grad()
def test_at_calibrated_timesteps_nothing_changes(maintain):
    for n in (1, 3, 10):
        t = TIMESTEPS[torch.arange(n)]
        assert torch.equal(
            quantized("float", maintain)(noise(n), t), quantized("nearest", maintain)(noise(n), t)
        )


@torch.no_grad()
def test_with_a_cache_pictures_are_nearer_to_float_than_a_neighbours_features_give():
    t, x = torch.arange(50, 950, 100), noise(9)
    exact = make(TinyUNet)(x, t)
    float_, nearest = ((quantized(u, "cache")(x, t) - exact).square().mean() for u in ("float", "nearest"))
    assert float_ < 0.8 * nearest
    report = quantized("float", "cache").report
    assert set(map(int, report["unseen_timesteps"])) >= set(t.tolist())


def test_its_operators():
    block = quantized("float").temporal_block
    names = [op_name(n) for n in block.graph.nodes]
    before = [op_name(n) for n in quantized("nearest").temporal_block.graph.nodes]
    added = [name for name in set(names) if names.count(name) > before.count(name)]
    for name in ("amin", "eq"):
        assert names.count(name) == before.count(name) + 1
    assert names.count("where") == before.count("where") + len(float_block()(T))
    assert names.count("linear") == 2 * before.count("linear")
    assert not [name for name in added if "quantize" in name]


@pytest.mark.parametrize("maintain", ["reconstruct", "cache"])
def test_the_block_stays_in_the_artefact_under_its_own_names(tmp_path, maintain):
    q = quantized("float", maintain)
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded(noise(6), T), q(noise(6), T))
    state = loaded.network.temporal_block.state_dict()
    for name, x in float_block().state_dict().items():
        assert torch.equal(state[name], x)
    sizes, other = q.report["sizes"], quantized("nearest", maintain).report["sizes"]
    assert sizes["quantized_bytes"] > other["quantized_bytes"]
    (note,) = [n for n in q.report["notes"] if n["name"] == "timestep"]
    assert f"{sum(x.nbytes for x in float_block().state_dict().values())} bytes" in note["reason"]


def prepared():
    gm = captured()
    block = extract_temporal(gm, find_temporal(gm))
    return tfmq_fx.calibrate(prepare(gm, RECIPE, timesteps=TIMESTEPS), calibration()), block


def test_a_second_run_changes_nothing():
    gm, block = prepared()
    assert float_at_unseen(gm, block=block).modified
    code = gm.code
    assert not float_at_unseen(gm, block=block).modified
    assert gm.code == code


def test_another_block_is_refused():
    gm, block = prepared()
    gm2 = tfmq_fx.capture(make(TinyUNet, seed=1), calibration().arguments(slice(0, 2)))
    other = extract_temporal(gm2, find_temporal(gm2))
    with pytest.raises(TFMQError, match="has different values in the graph"):
        float_at_unseen(gm, block=other)
    output = block.graph.output_node()
    output.args = (output.args[0][:1],)
    with pytest.raises(TFMQError, match="does not return the 2 temporal features"):
        float_at_unseen(gm, block=block)


@torch.no_grad()
def test_every_finite_input_must_be_known():
    finite = {"class_labels": [0, 1, 2]}
    net, data = make(Labelled), labelled_data()
    keep = data.tensors["class_labels"] < 3
    data = tfmq_fx.CalibrationSet.from_tensors({n: x[keep] for n, x in data.tensors.items()})
    q = tfmq_fx.quantize(net, dataclasses.replace(RECIPE, unseen="float"), calibration=data, finite=finite)
    t = data.tensors["timestep"][:1].expand(4).clone()
    t[1] += 1
    labels = torch.tensor([0, 1, 4, 2])
    gm = tfmq_fx.capture(net, data.arguments(slice(0, 2)))
    exact = extract_temporal(gm, find_temporal(gm))(t, labels)
    for got, wanted in zip(q.temporal_block(t, labels), exact, strict=False):
        assert [torch.equal(a, b) for a, b in zip(got, wanted, strict=True)] == [False, True, True, False]


@torch.no_grad()
def test_a_timestep_without_a_batch():
    x, seen = torch.randn(40, 4), TIMESTEPS[3]
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": TIMESTEPS.repeat(4)})
    q = tfmq_fx.quantize(make(ScalarTime), dataclasses.replace(RECIPE, unseen="float"), calibration=data)
    gm = tfmq_fx.capture(make(ScalarTime), {"sample": x[:2], "timestep": seen})
    exact = extract_temporal(gm, find_temporal(gm))
    assert torch.equal(q.temporal_block(seen + 1)[0], exact(seen + 1)[0])
    assert not torch.equal(q.temporal_block(seen)[0], exact(seen)[0])


@pytest.mark.parametrize("settings", [{"engine": "openvino"}, {"engine": "torch", "compile": False}])
@torch.no_grad()
def test_it_is_lowered(settings):
    q = quantized("float", "cache")
    low = lower(q, "cpu", precision="float32", batch=6, **settings)
    assert_same_but_for_ties(
        [(low(noise(6), T), q(noise(6), T)), (low(noise(1), T[1:2]), q(noise(1), T[1:2]))]
    )


@torch.no_grad()
def test_it_is_exported(tmp_path):
    import onnxruntime

    recipe = dataclasses.replace(RECIPE, unseen="float", maintain="cache")
    q = tfmq_fx.quantize(make(ScalarTime), recipe, calibration=vectors())
    q.export(tmp_path / "q.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"))
    x = torch.randn(6, 4)
    (got,) = session.run(None, {"sample": x.numpy(), "timestep": T.numpy()})
    assert_same_but_for_ties([(torch.from_numpy(got), q(x, T))])
