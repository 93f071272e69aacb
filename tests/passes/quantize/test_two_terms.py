"""Inputs in two integer terms: what the graph becomes, how precise it is, and what is refused."""

import dataclasses

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, TinyUNet, calibration, captured, make
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes.quantize.find_blocks import find_blocks
from tfmq_fx.recipe import Rule

NEAREST = tfmq_fx.Reconstruction(method="nearest")
# Only one layer's input is rounded, and no weight.
ALONE = tfmq_fx.Recipe(weight_bits=16, activation_bits=16, edge_weight_bits=16, reconstruction=NEAREST)
LAYER = "up_block.conv1.weight"
DATA = calibration()
INPUTS = (DATA.tensors["sample"], DATA.tensors["timestep"])


def recipe(terms, path=LAYER):
    rule = Rule(pattern=path, activation_bits=8, activation_terms=terms)
    return dataclasses.replace(ALONE, rules=(rule,))


def prepared(terms):
    return tfmq_fx.prepare(captured(), recipe(terms), timesteps=TIMESTEPS)


def test_the_graph_gains_a_second_product_of_the_same_weight():
    one, two = (
        [(op_name(n) or n.op, n.name) for n in prepared(k).graph.nodes if n.op.startswith("call")]
        for k in (1, 2)
    )
    count = lambda nodes, op: sum(name == op for name, _ in nodes)  # noqa: E731
    assert {op: count(two, op) - count(one, op) for op in ("sub", "conv2d", "add", "call_module")} == {
        "sub": 1, "conv2d": 1, "add": 1, "call_module": 1,
    }  # fmt: skip
    gm = prepared(2)
    readers = [n for n in gm.graph.nodes if op_name(n) == "conv2d" and n.args[1].target == LAYER]
    assert len(readers) == 2
    assert readers[1].args[2] is None  # the bias counts once


@torch.no_grad()
def test_two_terms_have_the_precision_of_sixteen_bits():
    exact = make(TinyUNet)(*INPUTS)
    errors = []
    for terms in (1, 2):
        converted = tfmq_fx.convert(tfmq_fx.calibrate(prepared(terms), DATA))
        errors.append((converted(*INPUTS) - exact).norm() / exact.norm())
    # The rounding step is 255 times as small; float32's own error in the two products leaves some of that.
    assert errors[0] > 1e-4
    assert errors[1] < errors[0] / 100


@torch.no_grad()
def test_converted_is_what_was_calibrated_bit_for_bit_and_saves(tmp_path):
    q = tfmq_fx.quantize(make(TinyUNet), recipe(2), calibration=DATA)
    gm = tfmq_fx.calibrate(prepared(2), DATA)
    assert torch.equal(q(*INPUTS), gm(*INPUTS))
    q.save_pretrained(tmp_path)
    assert torch.equal(tfmq_fx.load(tmp_path)(*INPUTS), q(*INPUTS))
    (layer,) = [x for x in q.report["layers"] if x["path"] == LAYER]
    assert layer["activation_terms"] == 2


def test_the_sum_is_no_residual_block():
    names = [[n.name for n in b.nodes if op_name(n) == "conv2d"] for b in find_blocks(prepared(1))]
    with_sum = [[n.name for n in b.nodes if op_name(n) == "conv2d"] for b in find_blocks(prepared(2))]
    assert len(names) == len(with_sum)


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_its_weight_is_reconstructed(method):
    settings = tfmq_fx.Reconstruction(method=method, iterations=20, tune_iterations=5, gptq_samples=20)
    rule = Rule(pattern=LAYER, activation_terms=2)
    w4a8 = tfmq_fx.Recipe(rules=(rule,), reconstruction=settings)
    q = tfmq_fx.quantize(make(TinyUNet), w4a8, calibration=DATA)
    assert any(r["error"] < r["error_nearest"] for r in q.report["reconstruction"])
    assert torch.isfinite(q(*INPUTS)).all()


def test_an_input_that_stays_in_float_has_no_terms():
    rule = Rule(pattern=LAYER, activation_bits=16, activation_terms=2)
    with pytest.raises(TFMQError, match=f"{LAYER}: activation_terms=2, but its input is not quantized"):
        tfmq_fx.prepare(captured(), dataclasses.replace(ALONE, rules=(rule,)), timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match="activation_terms: 3 is not 1 or 2"):
        Rule(pattern="*", activation_terms=3)


def test_gptq_sees_the_whole_input():
    """Its integers are those of the same layer with a float input, but for the coarse first term alone they were not."""
    settings = tfmq_fx.Reconstruction(method="gptq", tune_iterations=0, gptq_samples=40)
    integers = []
    for terms, bits in ((2, 8), (None, 16)):
        rule = Rule(pattern=LAYER, weight_bits=4, activation_bits=bits, activation_terms=terms)
        q = tfmq_fx.quantize(
            make(TinyUNet),
            dataclasses.replace(ALONE, rules=(rule,), reconstruction=settings),
            calibration=DATA,
        )
        integers.append(next(v for n, v in q.network.state_dict().items() if n.endswith(f"{LAYER}_q")))
    assert (integers[0] == integers[1]).float().mean() > 0.99


@pytest.mark.filterwarnings("ignore:this CPU has no int8 instructions:UserWarning")
@torch.no_grad()
def test_torchs_int8_kernels_run_both_products():
    rule = Rule(pattern=LAYER, activation_terms=2)
    w4a8 = tfmq_fx.Recipe(edge_weight_bits=4, rules=(rule,), reconstruction=NEAREST)  # AVX2 takes these too
    q = tfmq_fx.quantize(make(TinyUNet), w4a8, calibration=DATA)
    low = q.lower("cpu", engine="torch", precision="float32", compile=False)
    kernels = [k for k in low.report["lowering"]["kernels"] if k["path"] == LAYER]
    assert [k["int8"] for k in kernels] == [True, True]
    torch.testing.assert_close(low(*INPUTS), q(*INPUTS), rtol=1e-4, atol=1e-5)
