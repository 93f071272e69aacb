"""A network that sends tokens to experts, and takes a language model's layers with samples second: quantized, saved, lowered."""

import dataclasses

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import Experts, experts, make
from tests.helpers.lowered import lower
from tfmq_fx.base.errors import TFMQError

NEAREST = dataclasses.replace(
    tfmq_fx.Recipe.preset("w8a8"), reconstruction=tfmq_fx.Reconstruction(method="nearest"), smooth=None
)
# Of the largest value, but for tokens of which two experts are as good as equal: those may go to another.
CLOSE = 0.03


@pytest.fixture(scope="module")
def network():
    return make(Experts)


@pytest.fixture(scope="module")
def data():
    return tfmq_fx.CalibrationSet.from_tensors(experts(60))


@pytest.fixture(scope="module")
def quantized(network, data):
    return tfmq_fx.quantize(network, NEAREST, calibration=data)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_the_set_has_rows_first_and_gives_the_networks_own_arguments(network, data):
    assert data.tensors["layers"].shape == (60, 3, 5, 6)
    assert data.arguments(slice(0, 4))["layers"].shape == (3, 4, 5, 6)
    first = data.arguments(slice(0, 4), rows_first=True)
    with torch.no_grad():
        assert torch.equal(data.row_wise(network)(**first), network(**data.arguments(slice(0, 4))))


@pytest.mark.parametrize("rows", [1, 3, 7])  # as many as there are layers, too
def test_it_is_called_as_the_float_network_is(network, quantized, rows):
    given = experts(rows, words=8, tokens=20, seed=1)
    with torch.no_grad():
        expected = network(**given)
    assert relative(quantized(**given), expected) < CLOSE
    assert torch.equal(quantized(*given.values()), quantized(**given))
    assert quantized.report["inputs"]["layers"][0] == "N"  # rows first, inside
    with pytest.raises(TFMQError, match="'layers'"):
        quantized(given["x"], given["timestep"], given["layers"].mean(1)[:, :, 0])


def test_what_chooses_experts_stays_in_float_unless_a_rule_asks(network, data, quantized):
    def bits(q):
        return {layer["path"]: (layer["weight_bits"], layer["reason"]) for layer in q.report["layers"]}

    assert bits(quantized)["gate.weight"] == (
        16,
        "decides what is taken (topk): rounded, it would take others",
    )
    rule = tfmq_fx.Rule(pattern="gate.weight", weight_bits=8, activation_bits=8)
    asked = tfmq_fx.quantize(network, dataclasses.replace(NEAREST, rules=(rule,)), calibration=data)
    assert bits(asked)["gate.weight"][0] == 8


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_its_blocks_are_reconstructed(network, data, method):
    settings = tfmq_fx.Reconstruction(method=method, iterations=50, tune_iterations=0)
    nearest, learned = (
        tfmq_fx.quantize(network, tfmq_fx.Recipe(weight_bits=4, reconstruction=r), calibration=data)
        for r in (tfmq_fx.Reconstruction(method="nearest"), settings)
    )
    given = experts(64, seed=1)
    with torch.no_grad():
        expected = network(**given)
    assert relative(learned(**given), expected) < relative(nearest(**given), expected) < 0.05


def test_it_is_saved_loaded_and_lowered(quantized, tmp_path):
    given = experts(4, seed=2)
    expected = quantized(**given)
    quantized.save_pretrained(tmp_path)
    loaded = tfmq_fx.load(tmp_path)
    assert torch.equal(loaded(**given), expected)
    lowered = lower(loaded, "cpu")
    assert relative(lowered(**given), expected) < 0.02  # bfloat16 between the integers on some CPUs
    file = tmp_path / "experts.pt2"
    loaded.export(file)
    program = torch.export.load(file).module()
    rows_first = {**given, "layers": given["layers"].transpose(0, 1).contiguous()}
    found = program(**rows_first)
    torch.testing.assert_close(
        found[0] if isinstance(found, tuple) else found, expected, rtol=1e-4, atol=1e-4
    )


def test_the_default_recipe_chooses_for_it(network, data):
    q = tfmq_fx.quantize(network, "w8a8", calibration=data)
    given = experts(16, seed=3)
    with torch.no_grad():
        assert relative(q(**given), network(**given)) < CLOSE
