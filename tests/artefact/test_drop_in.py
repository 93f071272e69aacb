"""Called as the float network is: timesteps of any shape, unseen ones, wrong calls, casts."""

import copy
import dataclasses

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import FAST, TinyUNet, calibration, make
from tests.helpers.lowered import lower
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
    tiny.reset_unseen()


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


@pytest.mark.parametrize(
    "cast", [lambda q: q.half(), lambda q: q.to(torch.bfloat16), lambda q: q.to("meta", torch.half)]
)
def test_casts_are_refused(tiny, cast):
    with pytest.raises(TFMQError, match=r"a quantized network computes in torch\.float32, as captured"):
        cast(tiny)
    assert tiny.to("cpu", torch.float32) is tiny
    assert tiny.device.type == "cpu"


def other_scales():
    recipe = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=dataclasses.replace(FAST, method="nearest"))
    data = calibration()
    small = tfmq_fx.CalibrationSet.from_tensors(
        {"sample": data.tensors["sample"] / 5, "timestep": data.tensors["timestep"]}
    )
    return tfmq_fx.quantize(make(TinyUNet), recipe, calibration=small)


def test_a_state_dict_of_other_scales_is_refused_before_anything_is_loaded(tiny):
    q = other_scales()
    before = {n: x.clone() for n, x in q.state_dict().items()}
    with pytest.raises(
        TFMQError, match=r"other scales, which a state dict does not hold; use save_pretrained"
    ):
        q.load_state_dict(tiny.state_dict())
    assert all(torch.equal(x, before[n]) for n, x in q.state_dict().items())
    without = {n: x for n, x in tiny.state_dict().items() if n != "_extra_state"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "_extra_state"'):
        q.load_state_dict(without)


def test_a_state_dict_goes_back_into_its_network(tiny, tmp_path):
    copied = copy.deepcopy(tiny)
    for buffer in copied.network.buffers():
        buffer.zero_()
    torch.save(tiny.state_dict(), tmp_path / "q.pt")
    state = torch.load(tmp_path / "q.pt", weights_only=True)
    assert all(
        isinstance(x, torch.Tensor) for x in state.values()
    )  # the digest, too: safetensors holds no more
    with torch.device("meta"):
        assert str(copied.load_state_dict(state)) == "<All keys matched successfully>"
    with torch.no_grad():
        assert torch.equal(copied(X, 300), tiny(X, 300))


def test_a_compiled_network_takes_no_state_dict(tiny):
    low = lower(tiny, engine="torch", compile=False, batch=4)
    with pytest.raises(TFMQError, match="a compiled network is not in a state dict"):
        low.load_state_dict(low.state_dict())
