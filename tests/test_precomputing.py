"""A float network whose temporal features come from tables."""

import copy
import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, Labelled, ScalarTime, TinyUNet, calibration, make
from tests.helpers.maintenance import W4A8, guided_data
from tests.helpers.precomputed import (
    BETWEEN,
    Framed,
    Half,
    Pooled,
    Wide,
    chosen,
    example,
    noise,
    placed,
    precomputed,
)
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.base.errors import TFMQError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
# A product of a matrix with ten rows at once is summed in another order than with two: some units in the last place.
ROUNDINGS = {"rtol": 1e-5, "atol": 1e-6}
BLOCK = {"time_mlp.0.weight", "time_mlp.2.weight", "down_block.emb.weight", "up_block.emb.weight"}


@torch.no_grad()
def outputs(network, rows=2, **changes):
    given = {n: x.clone() for n, x in example(changes.pop("of", TinyUNet), rows).items()} | changes
    return network(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_the_networks_bit_for_bit(dtype):
    model, network = precomputed(Half, dtype), make(Half).to(dtype)
    assert chosen(model) == {"down_block.emb.weight": "table", "up_block.emb.weight": "table"}
    assert not BLOCK & set(tensors_of(model.network))
    assert model.dtype == dtype
    for rows in (2, 1, 5):
        for t in (TIMESTEPS[:1].expand(rows), torch.tensor([500, 0, 300, 0, 900])[:rows]):
            x = noise(rows).to(dtype)
            with torch.no_grad():
                assert torch.equal(model(x, t), network(x, t))
    assert model.report["unseen_timesteps"] == {}


def test_a_timestep_is_evaluated_once_for_each_number_of_rows():
    model = copy.deepcopy(precomputed())
    calls = []
    hook = model.outside.block.register_forward_hook(lambda *_: calls.append(1))
    for rows in (2, 5, 5, 1):
        assert torch.equal(outputs(model, rows), outputs(make(TinyUNet), rows))
    hook.remove()
    assert len(calls) == 6  # five timesteps at five rows and one at one row; the table is for two


@pytest.mark.parametrize("place", ["cpu", "disk", "device"])
def test_a_timestep_outside_the_table_evaluates_the_block(place):
    model = placed(precomputed(), place)
    for t in (torch.tensor([BETWEEN, 7]), torch.tensor([900, 7])):  # all outside, and one of two
        assert torch.equal(outputs(model, timestep=t), outputs(make(TinyUNet), timestep=t))
    assert model.report["unseen_timesteps"]["7"] > 0
    model.reset_unseen()


def test_without_the_block_its_neighbour_is_taken_or_it_is_refused():
    nearest, strict = precomputed(unseen="nearest"), precomputed(unseen="error")
    assert nearest.outside is None
    t = torch.full((2,), BETWEEN)
    assert torch.equal(outputs(nearest, timestep=t), outputs(nearest, timestep=TIMESTEPS[:1].expand(2)))
    with pytest.raises(TFMQError, match="timestep=901: not among the 10"):
        outputs(strict, timestep=t)


def test_features_of_a_request_are_made_once_for_each_conditioning():
    model, network = precomputed(Wide), make(Wide)
    assert chosen(model) == {"emb1.weight": "table", "emb2.weight": "request", "emb3.weight": "table"}
    assert not {"emb2.weight", "guidance.weight", "time.weight"} & set(tensors_of(model.network))
    before = model.outside.evaluations
    guidance = torch.tensor([3.0, 4.0, 3.0, 5.0])
    for t in (TIMESTEPS[:4], TIMESTEPS[4:8]):  # another timestep in every row
        got = outputs(model, 4, of=Wide, guidance=guidance.clone(), timestep=t)
        torch.testing.assert_close(
            got, outputs(network, 4, of=Wide, guidance=guidance, timestep=t), **ROUNDINGS
        )
    assert model.outside.evaluations == before + 3
    t = torch.tensor([BETWEEN, 900, 900, 0])
    got = outputs(model, 4, of=Wide, guidance=guidance, timestep=t)
    assert torch.equal(got, outputs(network, 4, of=Wide, guidance=guidance, timestep=t))


def test_requests_over_the_budget_are_forgotten_oldest_first():
    model = precomputed(Wide, request_bytes=2 * 10 * 4 * 4)  # ten timesteps of four float32, twice
    for guidance in (1.0, 2.0, 3.0, 3.0, 2.0):
        outputs(model, of=Wide, guidance=torch.tensor([guidance, guidance]))
    assert model.outside.evaluations == 3
    outputs(model, of=Wide, guidance=torch.tensor([1.0, 1.0]))
    assert model.outside.evaluations == 4


def test_conditioning_that_changes_at_every_step_gets_no_tables():
    model, network = copy.deepcopy(precomputed(Wide)), make(Wide)
    for step in (*range(8), 7, 7):
        guidance = torch.full((2,), float(step))
        got = outputs(model, of=Wide, guidance=guidance)
        torch.testing.assert_close(got, outputs(network, of=Wide, guidance=guidance), **ROUNDINGS)
    assert model.outside.evaluations == 4  # three in vain, and the one that came again


def test_threads_share_the_requests():
    model = copy.deepcopy(precomputed(Wide))
    expected = {g: outputs(model, 1, of=Wide, guidance=torch.tensor([float(g)])) for g in range(3)}
    fresh = copy.deepcopy(model)
    assert fresh.outside.evaluations == 0
    with ThreadPoolExecutor(4) as threads:
        jobs = [g % 3 for g in range(16)]
        got = list(threads.map(lambda g: outputs(fresh, 1, of=Wide, guidance=torch.tensor([float(g)])), jobs))
    assert all(torch.equal(x, expected[g]) for g, x in zip(jobs, got, strict=True))
    assert fresh.outside.evaluations == 3


def test_finite_labels_are_tabled_where_that_pays():
    network = make(Labelled)
    model = precomputed(Labelled, labels=2, timesteps=(900, 800))
    assert set(chosen(model).values()) == {"table"}
    got = outputs(model, of=Labelled)
    assert torch.equal(got, outputs(network, of=Labelled))
    t = torch.tensor([900, 800])
    other = torch.tensor([4, 1])  # a label outside
    assert torch.equal(
        outputs(model, of=Labelled, class_labels=other, timestep=t),
        outputs(network, of=Labelled, class_labels=other, timestep=t),
    )
    with pytest.raises(TFMQError, match=r"class_labels=4: not among the 2 values .*Precompute with it"):
        outputs(
            precomputed(Labelled, labels=2, timesteps=(900, 800), unseen="error"),
            of=Labelled, class_labels=other,
        )  # fmt: skip
    # Fifty rows are more than the layers; ten for each request are fewer.
    model = precomputed(Labelled, labels=5)
    assert set(chosen(model).values()) == {"request"}


@pytest.mark.parametrize("network", [TinyUNet, Wide])
def test_saved_and_loaded(network, tmp_path):
    model = precomputed(network)
    model.save_pretrained(tmp_path / "p")
    loaded = tfmq_fx.load(tmp_path / "p")
    assert type(loaded) is tfmq_fx.PrecomputedModel
    for t in (TIMESTEPS[:2], torch.tensor([BETWEEN, 900])):
        assert torch.equal(outputs(loaded, of=network, timestep=t), outputs(model, of=network, timestep=t))
    again = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(outputs(again, of=network), outputs(model, of=network))
    file = tmp_path / "p" / "temporal_block.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TFMQError, match=r"temporal_block\.safetensors: corrupt or truncated"):
        tfmq_fx.load(tmp_path / "p")


def test_in_another_precision():
    model = copy.deepcopy(precomputed(Wide)).to(torch.bfloat16)
    x = noise().bfloat16()
    for t in (TIMESTEPS[:2], torch.tensor([BETWEEN, 900])):
        got, expected = (
            outputs(m, of=Wide, sample=s, timestep=t) for m, s in ((model, x), (make(Wide), x.float()))
        )
        assert got.dtype == torch.bfloat16
        # Eight bits of mantissa, through two convolutions and a sum.
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.03)


def test_exported_the_block_is_in_the_file_where_a_request_needs_it(tmp_path):
    model = precomputed(Wide)
    found = model.export(tmp_path / "net.pt2")
    assert any("of the float temporal block are in it" in note for note in found.notes)
    assert any("nearest neighbour" in note for note in found.notes)
    program = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(outputs(program, of=Wide), outputs(make(Wide), of=Wide), **ROUNDINGS)
    with pytest.raises(TFMQError, match="strict"):
        model.closed(strict=True)
    assert precomputed(unseen="nearest").closed(strict=True)[1] == ()


def test_compiled():
    whole = torch.compile(precomputed(unseen="nearest"), backend="eager", fullgraph=True)
    assert torch.equal(outputs(whole), outputs(precomputed(unseen="nearest")))
    model = precomputed(Wide)
    compiled = torch.compile(model, backend="aot_eager")
    for t in (TIMESTEPS[:2], torch.tensor([BETWEEN, 900])):
        torch.testing.assert_close(
            outputs(compiled, of=Wide, timestep=t), outputs(model, of=Wide, timestep=t)
        )


def test_quantized_the_features_stay_tables():
    data = guided_data()
    model = precomputed(Wide)
    q = tfmq_fx.quantize(model, W4A8, calibration=data)
    direct = tfmq_fx.quantize(make(Wide), dataclasses.replace(W4A8, maintain="cache"), calibration=data)
    assert q.outside.taken == direct.outside.taken == ("linear_3",)
    assert torch.equal(outputs(q, of=Wide), outputs(direct, of=Wide))
    assert q.report["sizes"] == direct.report["sizes"]
    assert not any("emb" in n or "time." in n for n in tensors_of(q.network))


def test_quantized_from_tables_alone(tmp_path):
    precomputed(unseen="nearest").save_pretrained(tmp_path / "p")
    q = tfmq_fx.quantize(tfmq_fx.load(tmp_path / "p"), W4A8, calibration=calibration())
    assert {layer["path"] for layer in q.report["layers"]}.isdisjoint(BLOCK)
    error = outputs(q) - outputs(make(TinyUNet))
    assert error.square().mean() < 0.01 * outputs(q).square().mean()  # 4-bit weights, rounded to nearest


def test_a_feature_with_data_in_it_is_named_and_stays_computed():
    model = precomputed(Pooled)
    (note,) = model.report["notes"]
    assert note["name"] == "emb.weight"
    assert "mixed with tokens, which is data" in note["reason"]
    assert "emb.weight" in tensors_of(model.network)
    torch.testing.assert_close(outputs(model, of=Pooled), outputs(make(Pooled), of=Pooled), **ROUNDINGS)


def test_a_timestep_of_shape_0():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = tfmq_fx.precompute(
        make(ScalarTime), example={"sample": x, "timestep": torch.tensor(900)}, timesteps=TIMESTEPS
    )
    with torch.no_grad():
        for t in (900, BETWEEN):
            assert torch.equal(model(x, t), make(ScalarTime)(x, torch.tensor(t)))


def test_what_the_user_did_wrong():
    network, given = make(TinyUNet), example(TinyUNet)
    with pytest.raises(TFMQError, match=r"timesteps: tables for 1000 take \d+ bytes, .* at most about \d+"):
        tfmq_fx.precompute(network, example=given, timesteps=range(1000))
    with pytest.raises(TFMQError, match="timesteps: a network alone has no sampling run"):
        tfmq_fx.precompute(network, example=given)
    with pytest.raises(TFMQError, match="the network is precomputed already"):
        tfmq_fx.precompute(precomputed(), example=given, timesteps=TIMESTEPS)
    tokens = {**given, "timestep": TIMESTEPS[:6].reshape(2, 3)}
    with pytest.raises(TFMQError, match=r"mixes the timesteps of a sample, timestep of shape \(N, 3\)"):
        tfmq_fx.precompute(make(Framed), example=tokens, timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match="prompt: is an argument for a pipeline"):
        tfmq_fx.precompute(network, example=given, timesteps=TIMESTEPS, prompt="a cat")
    with pytest.raises(TFMQError, match="block='gpu': is unknown"):
        tfmq_fx.precompute(network, example=given, timesteps=TIMESTEPS, block="gpu")
    with pytest.raises(TFMQError, match="finite='labels': the graph has no such input"):
        tfmq_fx.precompute(network, example=given, timesteps=TIMESTEPS, finite={"labels": [1]})
    with pytest.raises(TFMQError, match=r"a Python int .* would be baked"):
        tfmq_fx.precompute(network, example={**given, "timestep": 3}, timesteps=TIMESTEPS)
