"""A timestep for each token or frame of a sample: from a pipeline's calls to a table, a quantized network and int8 kernels."""

import pytest
import torch

import tfmq_fx
from tests.helpers.nearest import recipe
from tests.helpers.tokens import (
    FRAMES,
    TIMESTEPS,
    TOKENS,
    Frames,
    Guided,
    Labelled,
    Mixed,
    Swapped,
    Tiled,
    Tokens,
    inputs,
    network,
)
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes.temporal.insert_step_index import TIMESTEPS as TABLE

BLOCK = ["time.0.weight", "time.2.weight", "proj.weight"]
CASES = {
    "early": (Tokens, "early", (TOKENS,)),
    "late": (Tokens, "late", (TOKENS,)),
    "before": (Tokens, "before", (TOKENS,)),
    "frames": (Frames, "late", (1, FRAMES, 1, 1)),
    "tiled": (Tiled, "late", (FRAMES,)),
}
# A product of a matrix with fewer rows is summed in another order: some units in the last place.
ROUNDINGS = {"rtol": 1e-5, "atol": 1e-6}
EIGHT_BITS = 0.02  # 0.5 to 0.9% were found


def data_of(shape, rows=16, **more):
    x, t = inputs(rows, shape)
    return tfmq_fx.CalibrationSet.from_tensors({"x": x, "timestep": t, **more})


def error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_table_has_every_tokens_features(case):
    cls, where, shape = CASES[case]
    net = network(cls, where)
    x, t = inputs(2, shape)
    model = tfmq_fx.precompute(net, example={"x": x, "timestep": t}, timesteps=TIMESTEPS)
    (feature,) = model.report["maintenance"]["features"]
    assert (feature["path"], feature["chosen"]) == ("proj.weight", "table")
    assert not set(BLOCK) & set(tensors_of(model.network))
    (table,) = (v for n, v in tensors_of(model.network).items() if n.endswith(".values"))
    by_hand = torch.cat([net.features(s.expand(2, *shape))[:1, 0] for s in TIMESTEPS])
    assert torch.equal(table, by_hand)
    for rows in (2, 1, 5):
        x, t = inputs(rows, shape, seed=rows)
        if case in ("frames", "tiled"):
            torch.testing.assert_close(model(x, t), net(x, t), **ROUNDINGS)
        else:
            assert torch.equal(model(x, t), net(x, t))
    x, t = inputs(2, shape, values=torch.tensor([900, 7, 0]))  # in no table: the layers are evaluated
    torch.testing.assert_close(model(x, t), net(x, t), **ROUNDINGS)
    assert list(model.report["unseen_timesteps"]) == ["7"]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_layer_of_the_block_has_a_scale_per_timestep(case, tmp_path):
    cls, where, shape = CASES[case]
    net, data = network(cls, where), data_of(shape)
    q = tfmq_fx.quantize(net, recipe("w8a8"), calibration=data, strict=True)
    keys = {layer["path"]: list(layer["key"]) for layer in q.report["layers"]}
    assert keys == {
        n: ["timestep"] if n in BLOCK else [] for n in (*BLOCK, "a.weight", "mid.weight", "b.weight")
    }
    x, t = inputs(4, shape, seed=1)
    assert 0 < error(q(x, t), net(x, t)) < EIGHT_BITS
    for i in range(4):  # no sample has another's timesteps
        torch.testing.assert_close(q(x[i : i + 1], t[i : i + 1]), q(x, t)[i : i + 1], **ROUNDINGS)
    q.save_pretrained(tmp_path / "q")
    assert torch.equal(tfmq_fx.load(tmp_path / "q")(x, t), q(x, t))
    # A timestep for a sample, or for all, is that of all its tokens.
    assert torch.equal(q(x, 500), q(x, torch.full_like(t, 500)))
    assert torch.equal(
        q(x, t.flatten(1)[:, 0]), q(x, t.flatten(1)[:, 0].reshape(-1, *[1] * len(shape)).expand_as(t))
    )


@pytest.mark.filterwarnings("ignore:this CPU has no int8 instructions")
@torch.no_grad()
def test_on_int8_kernels_and_exported(tmp_path):
    q = tfmq_fx.quantize(network(), recipe("w4a8"), calibration=data_of((TOKENS,)))
    x, t = inputs(2, seed=1)
    expected = q(x, t)
    for low in (
        q.lower("cpu", engine="openvino", batch=2),
        q.lower("cpu", engine="torch", batch=2, compile=False),
    ):
        # A scale that is moved behind the sum changes roundings only.
        assert error(low(x, t), expected) < 1e-2
    q.export(tmp_path / "q.pt2")
    exported = torch.export.load(tmp_path / "q.pt2").module()
    torch.testing.assert_close(exported(x=x, timestep=t), expected, **ROUNDINGS)


@torch.no_grad()
def test_what_joins_a_samples_timesteps_joins_those_of_all_its_tokens():
    net, label = network(Labelled), torch.arange(16) % 3
    x, t = inputs(16)
    given, finite = {"x": x, "timestep": t, "label": label}, {"label": range(3)}
    few = {n: v[:4] for n, v in given.items()}
    model = tfmq_fx.precompute(net, example=few, timesteps=TIMESTEPS, finite=finite)
    torch.testing.assert_close(model(**few), net(**few), **ROUNDINGS)
    assert model.report["maintenance"]["features"][0]["key"] == ("timestep", "label")
    data = tfmq_fx.CalibrationSet.from_tensors(given)
    for unseen in ("nearest", "float"):
        q = tfmq_fx.quantize(net, recipe("w8a8", unseen=unseen), calibration=data, finite=finite)
        assert 0 < error(q(**given), net(**given)) < EIGHT_BITS
    given["timestep"] = t.clamp(max=7)
    assert error(q(**given), net(**given)) < EIGHT_BITS


@torch.no_grad()
def test_a_requests_features_are_made_for_every_timestep_of_the_schedule():
    net = network(Guided)
    x, t = inputs(4)
    given = {"x": x, "timestep": t, "guidance": torch.tensor([1.0, 2.0, 1.0, 3.0])}
    model = tfmq_fx.precompute(net, example=given, timesteps=TIMESTEPS)
    assert model.report["maintenance"]["features"][0]["chosen"] == "request"
    for _ in range(2):
        torch.testing.assert_close(model(**given), net(**given), **ROUNDINGS)
    assert model.outside.evaluations == 3
    q = tfmq_fx.quantize(
        net, recipe("w8a8", maintain="cache"), calibration=tfmq_fx.CalibrationSet.from_tensors(given)
    )
    assert error(q(**given), net(**given)) < EIGHT_BITS


def test_scales_per_timestep_outside_the_block_are_refused_or_reported():
    asked = recipe("w8a8", keyed="all")
    q = tfmq_fx.quantize(network(), asked, calibration=data_of((TOKENS,)))
    reasons = {note["reason"] for note in q.report["notes"]}
    assert reasons == {"one scale per tensor: its samples have several timesteps each"}
    with pytest.raises(TFMQError, match=r"strict: .* its samples have several timesteps each"):
        tfmq_fx.quantize(network(), asked, calibration=data_of((TOKENS,)), strict=True)


@pytest.mark.parametrize(
    ("cls", "words"), [(Mixed, "mixes the timesteps of a sample"), (Swapped, "in another order")]
)
def test_a_block_that_does_not_keep_tokens_apart_is_refused(cls, words):
    x, t = inputs(2)
    with pytest.raises(TFMQError, match=rf"proj.weight: .*{words}"):
        tfmq_fx.precompute(network(cls), example={"x": x, "timestep": t}, timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.quantize(network(cls), recipe("w8a8"), calibration=data_of((TOKENS,)))


def test_a_timestep_of_another_shape_is_refused():
    x, t = inputs(2)
    model = tfmq_fx.precompute(network(), example={"x": x, "timestep": t}, timesteps=TIMESTEPS)
    for wrong in (t[:, :4], t[None], torch.cat([t, t])):
        with pytest.raises(
            TFMQError, match=r"timestep: has shape .* for a batch of 2, captured with \(N, 6\)"
        ):
            model(x, wrong)


def test_statistics_take_a_samples_largest_timestep():
    data = data_of((TOKENS,))
    t = data.tensors["timestep"]
    assert t.shape == (16, TOKENS)
    assert torch.equal(data.row_timesteps, t.amax(1))
    assert data.timesteps.tolist() == [900, 500, 100, 0]
    assert data.rows(torch.tensor([3, 1])).arguments(slice(0, 2))["timestep"].shape == (2, TOKENS)
    q = tfmq_fx.quantize(network(), recipe("w8a8"), calibration=data)
    measured = {e["timestep"] for e in q.report["errors_by_timestep"] if "output_relative_mse" in e}
    assert measured == set(t.amax(1).tolist())
    assert q.network.get_buffer(f"temporal_block.{TABLE}").tolist() == [900, 500, 100, 0]
