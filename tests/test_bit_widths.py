"""Mixed precision: what is measured, what is chosen, and that the choice becomes the network that was promised."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tfmq_fx
from benchmarks.networks.pipelines import ddpm
from benchmarks.networks.small import TIMESTEPS, TinyUNet, calibration, captured, make
from tests.helpers.command_line import run
from tfmq_fx import bit_widths as module
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.bit_widths import LayerSensitivity, Sensitivity, mixed_precision, sensitivity
from tfmq_fx.passes.quantize.state import state_of

NEAREST = tfmq_fx.Reconstruction(method="nearest")
W4A8 = tfmq_fx.Recipe(reconstruction=NEAREST)


@functools.cache
def calibrated():
    gm = tfmq_fx.prepare(captured(), W4A8, timesteps=TIMESTEPS)
    return tfmq_fx.calibrate(gm, calibration())


@functools.cache
def found():
    return sensitivity(calibrated(), calibration())


@torch.no_grad()
def test_a_weights_error_is_that_of_a_network_with_this_weight_alone_quantized():
    from tfmq_fx.base.metrics import relative_mse_by_timestep

    path = "up_block.conv1.weight"
    layer = next(x for x in found().layers if x.path == path)
    data = calibration().spread(64, seed=0)
    t, x = data.tensors["timestep"], data.tensors["sample"]
    network, rounded = make(TinyUNet), make(TinyUNet)
    w = rounded.up_block.conv1.weight
    observer = tfmq_fx.observers.PerChannelWeightFakeQuantize(bits=4, ch_axis=0)
    observer.initialise(w)
    w.copy_(observer.dequantized())
    expected = relative_mse_by_timestep(rounded(x, t), network(x, t), t)
    torch.testing.assert_close(
        layer.weight_errors[4], [expected[t] for t in found().timesteps], rtol=1e-3, atol=1e-9
    )


def test_every_layer_timestep_and_width_is_there_and_the_graph_as_it_was():
    layers = {x.path: x for x in found().layers}
    plan = state_of(calibrated()).plan
    assert layers.keys() == {x.path for x in plan.layers}
    assert found().timesteps == sorted(TIMESTEPS.tolist())
    assert set(layers["attention.qkv.weight"].weight_errors) == {4, 8}
    assert set(layers["conv_in.weight"].weight_errors) == {8}  # what the recipe demands of a first layer
    for layer in layers.values():
        assert len(layer.activation_errors) == len(TIMESTEPS)
        assert all(layer.error(b) > layer.error(16) == 0 for b in layer.weight_errors)
    assert layers["attention.qkv.weight"].error(8) < layers["attention.qkv.weight"].error(4)
    assert sum(layers["conv_in.weight"].activation_errors) == 0  # its input stays float
    again = sensitivity(calibrated(), calibration())
    assert again == found()
    with torch.no_grad():
        inputs = calibration().tensors["sample"], calibration().tensors["timestep"]
        fresh = tfmq_fx.calibrate(tfmq_fx.prepare(captured(), W4A8, timesteps=TIMESTEPS), calibration())
        assert torch.equal(calibrated()(*inputs), fresh(*inputs))


def random_layers(draw, count):
    return tuple(
        LayerSensitivity(
            path=str(i), op="linear", temporal=False, weights=draw(st.integers(1, 50)), rows=1, flops=draw(st.integers(1, 9)),
            weight_errors={4: [draw(st.floats(0.1, 1))], 8: [draw(st.floats(0, 0.1))]}, activation_errors=[0.01],
        )
        for i in range(count)
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_choice_keeps_the_budgets_and_is_nearly_the_best(data):
    layers = random_layers(data.draw, 4)
    space = Sensitivity(timesteps=[0.0], layers=layers, key="")
    every = [
        dict(zip("0123", bits, strict=True)) for bits in itertools.product((4, 8, 16), repeat=len(layers))
    ]
    low, high = space.bytes(dict.fromkeys("0123", 4)), max(map(space.bytes, every))
    budget = data.draw(st.integers(low, high))
    share = data.draw(st.floats(0, 1))
    total = sum(layer.flops for layer in layers)

    def fits(bits):
        in_float = sum(layer.flops for layer in layers if bits[layer.path] == 16)
        return space.bytes(bits) <= budget and in_float <= share * total

    chosen = space.choose(max_bytes=budget, max_float_flops=share)
    assert fits(chosen)
    best = min(space.error(bits) for bits in every if fits(bits))
    # Greedy by error per byte is short of the best by at most one step of one layer in each budget.
    steps = max(layer.error(4) for layer in layers)
    assert space.error(chosen) <= best + 2 * steps
    assert space.choose(max_bytes=high, max_float_flops=1.0) == dict.fromkeys("0123", 16)


def test_a_budget_below_everything_says_what_would_do():
    least = found().bytes({x.path: min(x.weight_errors) for x in found().layers})
    with pytest.raises(TFMQError, match=f"max_bytes=10: 14 layers take {least} bytes"):
        found().choose(max_bytes=10)
    assert set(found().choose(max_bytes=least).values()) == {4, 8}


def test_the_network_takes_the_bytes_that_were_promised():
    eight = found().bytes(dict.fromkeys([x.path for x in found().layers], 8))
    four = found().bytes({x.path: min(x.weight_errors) for x in found().layers})
    budget = (eight + four) // 2
    bits = found().choose(max_bytes=budget)
    recipe = mixed_precision(make(TinyUNet), W4A8, calibration=calibration(), max_bytes=budget)
    q = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration())
    assert {x["path"]: x["weight_bits"] for x in q.report["layers"]} == bits
    assert set(bits.values()) == {4, 8}
    least = tfmq_fx.quantize(make(TinyUNet), W4A8, calibration=calibration())
    grown = q.report["sizes"]["quantized_bytes"] - least.report["sizes"]["quantized_bytes"]
    assert abs(grown - (found().bytes(bits) - four)) <= len(bits)  # each weight ends on a whole byte
    assert found().error(bits) < found().error({x.path: min(x.weight_errors) for x in found().layers})


def test_layers_left_in_float_are_float_and_keep_the_speed_budget():
    recipe = mixed_precision(
        make(TinyUNet), W4A8, calibration=calibration(), max_bytes=1e9, max_float_flops=0.3
    )
    q = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=calibration())
    in_float = {x["path"] for x in q.report["layers"] if x["weight_bits"] == 16}
    flops = {x.path: x.flops for x in found().layers}
    assert in_float
    assert sum(flops[p] for p in in_float) <= 0.3 * sum(flops.values())
    assert {x["activation_bits"] for x in q.report["layers"] if x["path"] in in_float} == {16}


def test_it_is_measured_once_and_again_where_something_changed(tmp_path, monkeypatch):
    file = tmp_path / "sensitivity.json"
    first = sensitivity(calibrated(), calibration(), cache=file)
    measured = []
    original = module.relative_mse_by_timestep
    monkeypatch.setattr(module, "relative_mse_by_timestep", lambda *a: measured.append(1) or original(*a))
    assert sensitivity(calibrated(), calibration(), cache=file) == first
    assert not measured
    assert sensitivity(calibrated(), calibration(), widths=(8,), cache=file) != first
    assert measured
    assert json.loads(file.read_text())["layers"][0]["weight_errors"].keys() == {"8"}
    assert [f.name for f in tmp_path.iterdir()] == ["sensitivity.json"]
    file.write_text("{}")
    with pytest.raises(TFMQError, match=r"sensitivity\.json: is not a file of sensitivities"):
        sensitivity(calibrated(), calibration(), cache=file)


def test_rules_keep_what_they_say():
    rule = tfmq_fx.Rule(pattern="attention.*", weight_bits=6)
    recipe = dataclasses.replace(W4A8, rules=(rule,))
    gm = tfmq_fx.calibrate(tfmq_fx.prepare(captured(), recipe, timesteps=TIMESTEPS), calibration())
    assert not any(x.path.startswith("attention") for x in sensitivity(gm, calibration()).layers)


def test_bad_input_is_refused():
    for call, words in (
        (
            lambda: sensitivity(make(TinyUNet), calibration()),  # type: ignore[arg-type]
            "gm: expected GraphModule, found TinyUNet; capture the network first",
        ),
        (lambda: sensitivity(captured(), calibration()), "the graph is a float graph"),
        (lambda: sensitivity(calibrated(), calibration(), widths=(4, 16)), r"widths=\(4, 16\)"),
        (
            lambda: sensitivity(calibrated(), calibration(), widths=(1,)),
            "widths: 1 is not a supported bit width",
        ),
    ):
        with pytest.raises(TFMQError, match=words):
            call()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"max_bytes": "1MB"}, "max_bytes: '1MB' is not a positive number of bytes"),
        ({"max_bytes": float("nan")}, "max_bytes: nan is not a positive number"),
        ({"max_bytes": 1, "max_float_flops": None}, "max_float_flops: None is not a share"),
        ({"max_bytes": 1, "widths": (1,)}, "widths: 1 is not a supported bit width"),
    ],
)
def test_a_budget_is_checked_before_anything_else(budget, words):
    with pytest.raises(TFMQError, match=words):
        mixed_precision(make(TinyUNet), W4A8, calibration=calibration(), **budget)


@pytest.mark.parametrize("changes", [{}, {"group_size": 8}, {"weight_bits": 16}])
def test_a_budget_that_is_too_small_is_refused_before_anything_is_measured(monkeypatch, changes):
    recipe = dataclasses.replace(W4A8, **changes)
    gm = tfmq_fx.prepare(captured(), recipe, timesteps=TIMESTEPS)
    layers = sensitivity(tfmq_fx.calibrate(gm, calibration()), calibration(), rows=10).layers
    least = sum(x.bytes(min(x.weight_errors)) for x in layers)
    monkeypatch.setattr(module, "calibrate", None)
    with pytest.raises(TFMQError, match=f"max_bytes=10: 14 layers take {least} bytes at their fewest bits"):
        mixed_precision(make(TinyUNet), recipe, calibration=calibration(), max_bytes=10)


def test_the_command_line_keeps_the_budget(monkeypatch, capsys, tmp_path):
    ddpm().save_pretrained(tmp_path / "model")
    quick = ("--num-samples", 2, "--steps", 3, "--iterations", 0, "--tune-iterations", 0)
    common = ("quantize", tmp_path / "q", "--model", tmp_path / "model", *quick)
    code, _, err = run(
        monkeypatch, capsys, *common, "--max-megabytes", 0.008
    )  # 5.2 kB of weights at 4 bits, 10.4 at 8
    assert (code, err) == (0, "")
    code, _, err = run(monkeypatch, capsys, *common, "--max-megabytes", 1e-5)
    assert code == 2
    assert "error: --max-megabytes 1e-05: the weights take 0.00" in err
    report = tfmq_fx.load(tmp_path / "q").report
    assert {x["weight_bits"] for x in report["layers"]} == {4, 8}
    assert 9_000 < report["sizes"]["quantized_bytes"] < 12_000  # with scales and zero points 8.7 and 13.7
