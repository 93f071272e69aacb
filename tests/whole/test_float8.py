"""Linears of float8_e4m3fn, from the recipe to the loaded artefact, its exports and its kernels."""

import copy
import dataclasses
import functools

import pytest
import torch
from safetensors.torch import load_file

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, TinyUNet, calibration, captured, make
from tests.helpers.gpu import gpu  # noqa: F401  (a fixture)
from tests.helpers.lowered import assert_same_but_for_ties, kernels_of, lower, mixed, noise
from tests.helpers.nearest import quantized, recipe
from tfmq_fx.base import float8
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.float8 import dequantized, float8_weights
from tfmq_fx.graph.nodes import weight_argument
from tfmq_fx.observers import Float8FakeQuantize, PerChannelWeightFakeQuantize, TemporalObserver
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.runtimes import cuda

FLOAT8 = "float8_e4m3fn"
LINEARS = {"time_mlp.0", "time_mlp.2", "down_block.emb", "up_block.emb", "attention.qkv", "attention.out"}
of_float8 = functools.partial(quantized, linear_dtype=FLOAT8)


def plan(**changes):
    gm = tfmq_fx.prepare(captured(), recipe("w8a8", linear_dtype=FLOAT8, **changes), timesteps=TIMESTEPS)
    return gm, {layer.path.removesuffix(".weight"): layer for layer in state_of(gm).plan.layers}


def notes_of(gm):
    return {(n.name.removesuffix(".weight"), n.reason) for n in state_of(gm).plan.notes}


def rounded_linears(network):
    """The linears of a converted graph, those of its submodules too, by whether x and w are dequantized float8."""
    nodes = [n for m in network.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes]
    layers = [n for n in nodes if weight_argument(n) == 1 and "linear" in str(n.target)]
    return [tuple(dequantized(x) is not None for x in n.args[:2]) for n in layers]


def test_linears_alone_are_of_float8():
    _, layers = plan()
    assert {path for path, layer in layers.items() if layer.dtype == FLOAT8} == LINEARS
    q = of_float8("w8a8", "all")
    assert rounded_linears(q.network) == 6 * [(True, True)]
    assert {n.removesuffix(".weight_q") for n in float8_weights(q.network)} == LINEARS
    assert not {f["name"] for f in q.report["float"]} & {f"{path}.weight" for path in LINEARS}


@pytest.mark.parametrize(
    "changes", [{}, {"keyed": "all"}, {"activation_observer": "minmax"}, {"temporal_observer": "mse"}]
)
def test_scales_are_the_largest_magnitude_over_448(changes):
    gm, _ = plan(**changes)
    tfmq_fx.calibrate(gm, calibration())
    found = [o for _, o in observers(gm) if o.dtype == float8.DTYPE]
    weights = [o for o in found if isinstance(o, PerChannelWeightFakeQuantize)]
    keyed = [o for o in found if isinstance(o, TemporalObserver)]
    static = [o for o in found if isinstance(o, Float8FakeQuantize)]
    assert len(weights) == 6
    assert (len(keyed), len(static)) == ((6, 0) if changes.get("keyed") == "all" else (4, 2))
    for o in weights:
        assert torch.equal(o.q.float().abs().amax(1), torch.full((len(o.q),), 448.0))
    if "temporal_observer" not in changes:
        for o in keyed:
            assert torch.equal(o.scale, torch.maximum(o.max_val, -o.min_val) / 448)
            assert not o.zero_point.any()
    for o in static:
        seen = o.activation_post_process
        whole = torch.maximum(seen.max_val, -seen.min_val) / 448
        if changes.get("activation_observer") == "minmax":
            assert torch.equal(o.scale[0], whole)
        else:  # the range of least error over the histogram
            assert 0.2 * whole <= o.scale[0] <= whole


ARTEFACTS = [
    ("w8a8", {"keyed": "all"}),
    pytest.param("w4a8", {"activation_granularity": "token"}, marks=pytest.mark.slow),
]


@torch.no_grad()
@pytest.mark.parametrize(("bits", "changes"), ARTEFACTS)
def test_prepared_converted_saved_loaded_and_exported_agree_bit_for_bit(bits, changes, tmp_path):
    q = of_float8(bits, **changes)
    x, t = noise(10), TIMESTEPS
    expected = q(x, t)
    gm = tfmq_fx.prepare(captured(), recipe(bits, linear_dtype=FLOAT8, **changes), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(gm, calibration())
    assert_same_but_for_ties([(expected, gm(x, t))])  # of convolutions
    q.save_pretrained(tmp_path / "q")
    loaded = tfmq_fx.load(tmp_path / "q")
    assert torch.equal(loaded(x, t), expected)
    q.export(tmp_path / "net.pt2")
    assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(sample=x, timestep=t), expected)
    tensors = load_file(tmp_path / "q" / "diffusion_pytorch_model.safetensors")
    size = sum(v.numel() * v.element_size() for v in tensors.values())
    assert size == loaded.report["sizes"]["quantized_bytes"]
    weight = tensors["attention.qkv.weight_q"]
    rounded = rounded_linears(q.network)
    if bits == "w4a8":  # packed: two to a byte, and the zero points too
        assert rounded.count((True, False)) == 5  # one is an edge, of 8 bits
        assert (weight.dtype, weight.numel()) == (torch.uint8, 8 * 24 // 2)
    else:
        assert (weight.dtype, set(rounded)) == (float8.DTYPE, {(True, True)})
        assert "attention.qkv.weight_zero_point" not in tensors


@torch.no_grad()
def test_the_error_is_that_of_eight_bits():
    """Relative squared error of the output over the schedule, with integers and with float8: 6e-4 both were measured."""
    x, t = noise(10), TIMESTEPS
    exact = make(TinyUNet)(x, t)
    errors = [
        float((q(x, t) - exact).square().mean() / exact.square().mean())
        for q in (of_float8("w8a8", "all"), quantized("w8a8", "all"))
    ]
    assert errors[0] < 2e-3
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_half_precision_scales_and_numbers_stay(dtype):
    q = copy.deepcopy(of_float8("w8a8", "all"))
    x, t = noise(10), TIMESTEPS
    expected = q(x, t)
    before = {n: v for n, v in q.network.state_dict().items() if "scale" in n or v.dtype == float8.DTYPE}
    low = q.to(dtype)
    after = low.network.state_dict()
    assert len(before) > 12
    assert all(
        after[n].dtype == v.dtype and torch.equal(after[n].float(), v.float()) for n, v in before.items()
    )
    y = low(x.to(dtype), t)
    assert y.dtype is dtype
    assert (y.float() - expected).abs().max() <= 0.05 * expected.abs().max()  # as of any 8 bits


def reconstructed(**changes):
    settings = dataclasses.replace(FAST, **changes)
    gm, _ = plan(reconstruction=settings)
    tfmq_fx.calibrate(gm, calibration())
    before = {n.name: o.q for n, o in observers(gm) if isinstance(o, PerChannelWeightFakeQuantize)}
    tfmq_fx.reconstruct(gm, calibration(), settings)
    after = {n.name: o for n, o in observers(gm) if isinstance(o, PerChannelWeightFakeQuantize)}
    moved = [
        n
        for n, o in after.items()
        if o.dtype == float8.DTYPE and not torch.equal(o.q.float(), before[n].float())
    ]
    return gm, after, moved


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "gptq"},
        {"method": "adaround", "tune_iterations": 4, "learn_activation_scale": True},
    ],
)
def test_reconstruction_rounds_to_the_same_numbers(changes):
    gm, weights, moved = reconstructed(**changes)
    assert moved  # otherwise nothing was learned
    for result in state_of(gm).reconstruction:
        assert result.error <= result.error_nearest
    for o in weights.values():
        assert o.q.dtype == o.dtype
        assert o.dequantized().isfinite().all()
    converted = tfmq_fx.convert(gm)
    with torch.no_grad():
        assert converted(noise(3), mixed(3)).isfinite().all()


def test_tuning_starts_at_the_numbers_it_has():
    """Fractions between two numbers are kept, but none is so far away that it would round to another."""
    gm, _ = plan()
    weights = [(o, n) for n, o in observers(gm) if isinstance(o, PerChannelWeightFakeQuantize)]
    network = dict(captured().named_parameters())
    for o, node in weights:
        before = o.q.float()
        o.start_tuning(network[str(node.args[0].target)])
        o.tuned()
        o.stop_tuning()
        assert torch.equal(o.q.float(), before)


def test_other_bits_become_eight_and_the_notes_say_so():
    gm, layers = plan(weight_bits=6, activation_bits=4)
    assert (layers["attention.qkv"].weight_bits, layers["attention.qkv"].activation_bits) == (8, 8)
    assert (layers["down"].weight_bits, layers["down"].activation_bits) == (6, 4)
    found = notes_of(gm)
    assert ("attention.qkv", "weight of 8 bits instead of 6: float8_e4m3fn has no fewer") in found
    assert ("attention.qkv", "activation of 8 bits instead of 4: float8_e4m3fn has no fewer") in found
    assert ("time_mlp.0", "weight of 8 bits instead of 6: float8_e4m3fn has no fewer") not in found  # an edge


def test_a_rule_for_some_layers():
    rules = (
        tfmq_fx.Rule(pattern="attention.*", linear_dtype="int"),
        tfmq_fx.Rule(pattern="down.*", linear_dtype=FLOAT8),
    )
    gm, layers = plan(rules=rules)
    assert {p for p, layer in layers.items() if layer.dtype == FLOAT8} == {
        p for p in LINEARS if "attention" not in p
    }
    assert ("down", "conv2d multiplies integers: linear_dtype is for linears") in notes_of(gm)


@pytest.mark.parametrize(
    ("changes", "expected"), [({"activation_bits": 16}, (False, True)), ({"weight_bits": 16}, (True, False))]
)
def test_sixteen_bits_stay_float(changes, expected):
    gm, _ = plan(edge_weight_bits=2, **changes)
    tfmq_fx.calibrate(gm, calibration())
    assert set(rounded_linears(tfmq_fx.convert(gm))) == {expected}


def test_what_contradicts_itself_is_refused():
    with pytest.raises(TFMQError, match=r"linear_dtype: 'float8' is unknown; use one of int, float8_e4m3fn"):
        tfmq_fx.Recipe(linear_dtype="float8")
    with pytest.raises(TFMQError, match=r"Rule\('a'\).linear_dtype: 'e5m2' is unknown"):
        tfmq_fx.Rule(pattern="a", linear_dtype="e5m2")
    with pytest.raises(TFMQError, match="'kl' counts values by integer"):
        tfmq_fx.Recipe(temporal_observer="kl", rules=(tfmq_fx.Rule(pattern="a", linear_dtype=FLOAT8),))
    with pytest.raises(
        TFMQError,
        match=r'attention.out.weight: activation_terms=2 is for integers; give it linear_dtype="int"',
    ):
        plan(rules=(tfmq_fx.Rule(pattern="attention.out.*", activation_terms=2),))


@pytest.mark.slow
def test_what_the_recipe_leaves_open_is_chosen():
    settings = dataclasses.replace(
        tfmq_fx.Recipe.preset("w8a8"), linear_dtype=FLOAT8, float_flops=0.0, double_flops=0.5
    )
    q = tfmq_fx.quantize(make(TinyUNet), settings, calibration=calibration())
    for layer in q.report["layers"]:
        if layer["dtype"] == FLOAT8:
            assert layer["activation_terms"] == 1
            assert layer["temporal"] or not layer["key"]  # a scale of its own would gain nothing


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@torch.no_grad()
def test_on_a_cpu_the_same_numbers_run_in_float_and_the_report_says_so(engine):
    pytest.importorskip(engine)
    q = of_float8("w8a8", "all")
    settings = {"engine": engine, "precision": "float32", **({"compile": False} if engine == "torch" else {})}
    low = lower(q, "cpu", **settings)
    assert_same_but_for_ties([(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in (1, 3)])
    for path, kernel in kernels_of(low).items():
        if path.removesuffix(".weight") in LINEARS:
            assert (kernel["int8"], kernel["float8"], kernel["fell_back"]) == (False, False, True)
            assert kernel["reason"].startswith("it multiplies float8_e4m3fn")
    with pytest.raises(TFMQError, match=r"strict: .*it multiplies float8_e4m3fn"):
        lower(q, "cpu", **settings, strict=True)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "changes"), ARTEFACTS)
def test_a_gpu_runs_them_on_its_kernels(bits, changes, gpu):  # noqa: ARG001, F811
    q = of_float8(bits, **changes)
    low = q.lower("cuda", compile=False, precision="float32", strict=True)
    assert_same_but_for_ties([(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in (1, 3)])
    kernels = kernels_of(low)
    for path in LINEARS:
        found = kernels[f"{path}.weight"]
        assert (found["kernel"], found["precision"]) == ("tfmq.float8_linear.default", "f8e4m3fn")
        assert (found["float8"], found["int8"], found["fell_back"]) == (True, False, False)
    flops = low.report["lowering"]["flops"]
    assert 0 < flops["float8"] < flops["total"] - flops["int8"]
    assert "float8" not in quantized().lower("cuda", compile=False).report["lowering"]["flops"]


@torch.no_grad()
def test_an_older_gpu_runs_them_in_float(gpu, monkeypatch):  # noqa: ARG001, F811
    older = dataclasses.replace(cuda.require_gpu(), capability=(8, 0))
    monkeypatch.setattr(cuda, "require_gpu", lambda: older)
    q = of_float8("w8a8", "all")
    low = q.lower("cuda", compile=False, precision="float32")
    assert_same_but_for_ties([(low(noise(3), mixed(3)), q(noise(3), mixed(3)))])
    reason = "float8 kernels need compute capability 8.9, and this GPU has 8.0"
    assert [k["reason"] for k in kernels_of(low).values()].count(reason) == 6
