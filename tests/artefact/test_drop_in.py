"""Called as the float network is: timesteps of any shape, unseen ones, wrong calls, casts."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import FAST, TinyUNet, calibration, make
from tests.helpers.lowered import lower
from tests.helpers.nearest import quantized
from tfmq_fx.artefact.drop_in import uncounted
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
        (
            lambda q: q(X.repeat(1, 2, 1, 1), 300),
            r"shape \(4, 2, 8, 8\), captured with \(N, 1, any \(8\), any \(8\)\)",
        ),
        (lambda q: q(X.double(), 300), "is torch.float64, captured as torch.float32"),
        (lambda q: q(X, torch.tensor([1, 2])), "2 timesteps for a batch of 4"),
        (lambda q: q(X, 0.5), "integer timesteps"),
        (lambda q: q([1], 300), "must be a tensor"),
    ],
)
def test_wrong_calls_get_one_clear_error(tiny, call, words):
    with pytest.raises(TFMQError, match=words):
        call(tiny)


CASTS = {
    "half": (lambda q: q.half(), torch.float16),
    "bfloat16": (lambda q: q.bfloat16(), torch.bfloat16),
    "to": (lambda q: q.to(torch.float16), torch.float16),
    "back": (lambda q: q.half().float(), torch.float32),
    "and device": (lambda q: q.to("meta", torch.bfloat16).dtype and q, torch.bfloat16),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_changes_the_glue_and_neither_integers_nor_scales(tiny, name):
    cast, dtype = CASTS[name]
    before, q = tiny.state_dict(), cast(copy.deepcopy(tiny))
    assert q.dtype == dtype == getattr(torch, q.interface.inputs["sample"]["dtype"])
    for key, x in q.state_dict().items():
        if key.endswith(("_q", "scale", "zero_point", "_table")):
            assert x.dtype == before[key].dtype
            assert x.is_meta or torch.equal(x, before[key]), key
        elif key.endswith(".bias"):
            assert x.dtype == dtype, key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_network_takes_and_returns_its_dtype(tiny, dtype, tmp_path):
    q = copy.deepcopy(tiny).to(dtype)
    with torch.no_grad():
        exact, y = tiny(X, 300), q(X.to(dtype), 300)
        assert y.dtype == dtype
        assert torch.equal(q(X.to(dtype).float(), 300), y)  # pipelines give some inputs in float32
        q.save_pretrained(tmp_path / "q")
        assert torch.equal(tfmq_fx.load(tmp_path / "q")(X.to(dtype), 300), y)
        # An activation near a tie takes the next of 256 integers, in each of ten layers.
        assert (y.float() - exact).norm() < 0.03 * exact.norm()
    assert q.report["unseen_timesteps"] == {}


def test_a_cast_network_still_refuses_a_state_dict_of_its_graph_alone(tiny):
    half = copy.deepcopy(tiny).half()
    half.load_state_dict(half.state_dict())
    with pytest.raises(TFMQError, match=r"q\.network lacks the scales"):
        half.network.load_state_dict(half.network.state_dict())


def test_a_cast_to_another_dtype_is_refused(tiny):
    with pytest.raises(TFMQError, match=r"to\(torch\.float64\): use float32, float16 or bfloat16"):
        copy.deepcopy(tiny).double()
    assert tiny.to("cpu", torch.float32) is tiny


def test_a_timestep_in_half_precision_is_its_schedules_value(tiny):
    with torch.no_grad():
        copy.deepcopy(tiny).bfloat16()(X.bfloat16(), torch.tensor(900.0, dtype=torch.bfloat16))
        tiny(X, torch.tensor(900.0, dtype=torch.bfloat16))  # 900 is between two numbers of bfloat16
    assert tiny.report["unseen_timesteps"] in ({}, {"900.0": 1})
    tiny.reset_unseen()


class Optional(nn.Module):
    """A network with plain arguments: nested, without a default, with a list as default."""

    def __init__(self):
        super().__init__()
        self.t, self.a, self.b = nn.Linear(1, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, sample, timestep, condition, options=None, scale=1.0, weights=(1.0, 2.0)):
        scale = 3.0 if scale is None else scale
        h = self.a(sample) * (options or {}).get("scale", 1.0) * scale + self.t(
            timestep.float()[:, None] / 1000
        )
        return self.b(torch.relu(h) * sum(weights) * (1.0 if condition is None else condition))


NEAREST = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
ROWS, STEPS = torch.randn(16, 4), torch.arange(0, 800, 100).repeat(2)


def with_constants(paths):
    """Return a network that was captured with these arguments by path, and the float one."""
    flat = {"_".join(map(str, path)): value for path, value in paths.items()}
    data = tfmq_fx.CalibrationSet(
        {"sample": ROWS, "timestep": STEPS}, flat, "timestep", {"_".join(map(str, p)): p for p in paths}
    )
    network = make(Optional)
    return tfmq_fx.quantize(network, NEAREST, calibration=data), network


@pytest.mark.parametrize(
    ("captured", "given", "words"),
    [
        ({("options", "scale"): 0.25}, {}, "'options_scale' was 0.25 .* but is left out here"),
        ({("options", "scale"): 0.25}, {"options": {}}, "'options_scale' was 0.25 .* but is left out here"),
        ({("options", "scale"): 0.25}, {"options": {"scale": 0.5}}, "'options_scale' was 0.25 .* new value"),
        ({("scale",): 2.0}, {}, "'scale' was 2.0 when"),
        ({}, {"scale": None}, "'scale' was 1.0 .* but is left out here"),
        ({("scale",): None}, {}, "'scale' was None when"),
        ({("weights", 0): 3.0}, {}, "'weights_0' was 3.0 when"),
        ({}, {"weights": [1.0]}, "'weights_1' was 2.0 .* but is left out here"),
    ],
)
def test_an_argument_that_is_left_out_is_refused_as_a_changed_one(captured, given, words):
    q, _ = with_constants({("condition",): None, **captured})
    with pytest.raises(TFMQError, match=words):
        q(ROWS, STEPS, None, **given)


@pytest.mark.parametrize(
    ("captured", "given"),
    [
        ({}, {"scale": 1.0, "weights": [1.0, 2.0], "options": None}),
        ({("scale",): 1.0, ("weights", 0): 1.0, ("weights", 1): 2.0}, {}),
        ({("scale",): None}, {"scale": None}),
        ({("weights", 0): 3.0}, {"weights": [3.0]}),
        ({("options", "scale"): 0.25}, {"options": {"scale": 0.25}}),
    ],
)
def test_an_argument_may_be_left_out_where_that_is_its_value(captured, given, tmp_path):
    q, network = with_constants({("condition",): None, **captured})
    q.save_pretrained(tmp_path / "q")
    with torch.no_grad():
        expected = network(ROWS, STEPS, None, **given)
        for form in (q, tfmq_fx.load(tmp_path / "q")):
            found = form(ROWS, STEPS, None, **given)
            assert (found - expected).norm() < 0.05 * expected.norm()


def test_an_argument_without_a_default_must_be_given_even_if_none():
    q, _ = with_constants({("condition",): None})
    with pytest.raises(TFMQError, match="the argument 'condition' is missing"):
        q(ROWS, STEPS)
    with pytest.raises(TFMQError, match="'condition' was None when"):
        q(ROWS, STEPS, 2.0)


def test_cache_contexts_take_whatever_a_pipeline_says_of_its_step(tiny):
    with tiny.cache_context("cond", step_index=0, sigma=1.0, num_inference_steps=2) as nothing:
        assert nothing is None


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


def test_a_graph_alone_takes_no_state_dict(tiny):
    with pytest.raises(TFMQError, match=r"state dict of q\.network lacks the scales"):
        tiny.network.load_state_dict(tiny.network.state_dict())
    for copied in (copy.deepcopy(tiny), nn.ModuleDict({"unet": copy.deepcopy(tiny)})):
        copied.load_state_dict(copied.state_dict())
        inner = copied if copied is not tiny and hasattr(copied, "network") else copied["unet"]
        with pytest.raises(TFMQError, match=r"state dict of q\.network lacks the scales"):
            inner.network.load_state_dict(inner.network.state_dict())


def test_calls_are_counted_while_another_thread_compiles(tiny):
    q = copy.deepcopy(tiny)
    compiling, done = threading.Event(), threading.Event()

    def backend(gm, _):
        compiling.set()
        assert done.wait(60)
        return gm

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    thread = threading.Thread(target=compiled, args=(X,))
    thread.start()
    try:
        assert compiling.wait(60)
        with torch.no_grad():
            q(X, 451)
        given = X.clone().requires_grad_()
        q(given, 300).sum().backward()
    finally:
        done.set()
        thread.join()
    assert q.report["unseen_timesteps"] == {"451": 1}
    assert given.grad.abs().sum() > 0


def test_short_runs_that_probe_count_and_refuse_nothing(tiny):
    q = copy.deepcopy(tiny)
    q.recipe = {**q.recipe, "unseen": "error"}
    with torch.no_grad(), uncounted():
        q(X, 451)
    assert q.report["unseen_timesteps"] == {}
    with pytest.raises(TFMQError, match="timestep=451"):
        q(X, 451)


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
    with pytest.raises(TFMQError, match=r"somewhere: a compiled network cannot be saved; save the network"):
        low.save_pretrained("somewhere")


def test_a_new_network_is_built_as_a_loaded_one(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    assert set(tiny.state_dict()) == set(loaded.state_dict())
    assert [n for n, _ in tiny.named_parameters()] == [n for n, _ in loaded.named_parameters()] == ["where"]
    assert not tiny.training
    assert not loaded.training
    loaded.load_state_dict(tiny.state_dict())


@torch.no_grad()
def test_a_compiled_network_refuses_unseen_timesteps_and_rounds_fractions():
    q = tfmq_fx.quantize(
        make(TinyUNet), tfmq_fx.Recipe(reconstruction=FAST, unseen="error"), calibration=calibration()
    )
    compiled = torch.compile(q, backend="eager")
    t = torch.tensor([100.0] * len(X))
    assert torch.equal(compiled(X, t), q(X, t))
    with pytest.raises(TFMQError, match="timestep=150: not among"):
        compiled(X, torch.tensor([150.0] * len(X)))
    torch._dynamo.reset()
    nearest = torch.compile(quantized("w8a8"), backend="eager")
    assert torch.equal(nearest(X, t - 0.4), nearest(X, t))
