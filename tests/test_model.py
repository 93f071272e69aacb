import dataclasses

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import FAST, TinyUNet, calibration, make
from tfmq_fx.base.errors import TFMQError

X = torch.randn(4, 1, 8, 8)


@pytest.mark.parametrize(
    "t", [300, 300.0, torch.tensor(300), torch.tensor([300]), torch.tensor([300.0]), torch.tensor([300] * 4)]
)
def test_a_timestep_may_be_a_number_or_any_shape(tiny, t):
    with torch.no_grad():
        assert torch.equal(tiny(X, t), tiny(X, torch.tensor([300, 300, 300, 300])))
        assert torch.equal(tiny(sample=X, timestep=t), tiny(X, t))


def test_unseen_timesteps_are_counted(tiny):
    before = dict(tiny.report["unseen_timesteps"])
    with torch.no_grad():
        tiny(X, torch.tensor([300, 451, 452, 451]))
        tiny(X, 451)
    assert before == {}
    assert tiny.report["unseen_timesteps"] == {"451": 2, "452": 1}
    tiny._unseen["timestep"].clear()


def test_unseen_timesteps_are_refused_on_request():
    recipe = dataclasses.replace(
        tfmq_fx.Recipe(unseen="error"), reconstruction=dataclasses.replace(FAST, method="nearest")
    )
    q = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration())
    with pytest.raises(TFMQError, match=r"timestep=451: .*neighbours are 400 and 500"):
        q(X, 451)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: q(X, 300, 1), "'argument 3' is unknown"),
        (lambda q: q(X, timestp=3), "'timestp' is unknown; the network takes timestep"),
        (lambda q: q(X), "the argument 'timestep' is missing"),
        (lambda q: q(X[:, :, :4], 300), r"shape \(4, 1, 4, 8\), captured with \(N, 1, 8, 8\)"),
        (lambda q: q(X.double(), 300), "is torch.float64, captured as torch.float32"),
        (lambda q: q(X, torch.tensor([1, 2])), "2 timesteps for a batch of 4"),
        (lambda q: q(X, 300.5), "integer timesteps"),
        (lambda q: q([1], 300), "must be a tensor"),
    ],
)
def test_wrong_calls_get_one_clear_error(tiny, call, words):
    with pytest.raises(TFMQError, match=words):
        call(tiny)


def test_it_compiles_without_a_recompile_between_steps(tiny):
    compiled = torch.compile(tiny, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in (900, 300, 0):
            step = torch.full((4,), t)
            torch.testing.assert_close(compiled(X, step), tiny(X, step))


def test_it_exports_as_it_is(tiny, tmp_path):
    t = torch.tensor([300, 0, 900, 500])
    with torch.no_grad():
        program = torch.export.export(tiny, (X, t), strict=False)
        torch.export.save(program, tmp_path / "q.pt2")
        assert torch.equal(torch.export.load(tmp_path / "q.pt2").module()(X, t), tiny(X, t))


def test_train_and_eval_are_harmless(tiny):
    with torch.no_grad():
        expected = tiny(X, 300)
        assert torch.equal(tiny.train().eval()(X, 300), expected)


def test_the_report_lists_everything(tiny):
    report = tiny.report
    network = make(TinyUNet)
    layers = {layer["path"] for layer in report["layers"]}
    floats = {f["name"] for f in report["float"]}
    assert layers | floats >= {name for name, _ in network.named_parameters()}
    assert {"input of conv_in.weight", "input of conv_out.weight"} <= floats
    assert any("scaled_dot_product_attention" in f for f in floats)
    assert report["temporal_block"] == {
        "features": 2,
        "timesteps": 10,
        "finite": {},
        "keys": {"linear_2": ["timestep"], "linear_5": ["timestep"]},
    }
    assert len(report["errors_by_timestep"]) == 10
    assert report["sizes"]["quantized_weights"] + report["sizes"]["float_parameters"] == sum(
        p.numel() for p in network.parameters()
    )
    assert {r["kept"] for r in report["reconstruction"]} <= {"learned", "gptq", "nearest"}


def test_a_network_without_calibration_data_is_refused():
    with pytest.raises(TFMQError, match="a network alone has no trajectories"):
        tfmq_fx.quantize(make(TinyUNet))


def test_unknown_recipes_show_the_nearest():
    with pytest.raises(TFMQError, match="'w4a9' is not a preset; presets are w4a8"):
        tfmq_fx.quantize(make(TinyUNet), "w4a9", calibration=calibration())


@pytest.mark.parametrize(
    "cast", [lambda q: q.half(), lambda q: q.to(torch.bfloat16), lambda q: q.to("meta", torch.half)]
)
def test_casts_are_refused(tiny, cast):
    with pytest.raises(TFMQError, match=r"a quantized network computes in torch\.float32, as captured"):
        cast(tiny)
    assert tiny.to("cpu", torch.float32) is tiny
    assert tiny.device.type == "cpu"
