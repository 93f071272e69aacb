"""What is subtracted from an activation is bounded: the same values, and nothing else is touched."""

from collections import Counter

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import calibration
from tests.helpers.int8_passes import operators
from tests.helpers.nearest import quantized
from tfmq_fx.artefact.program import flat_graph
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.passes.int8.bound_first_terms import bound_first_terms
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.pass_manager import PassManager

DATA = calibration()
INPUTS = (DATA.tensors["sample"], DATA.tensors["timestep"])


def flat(terms, keyed):
    rule = tfmq_fx.Rule(pattern="up_block.conv1.weight", activation_terms=terms)
    gm = flat_graph(quantized("w8a8", keyed, rules=(rule,)))
    PassManager(TO_INT8)(gm)
    return gm


@pytest.mark.parametrize("keyed", ["block", "all"])
@torch.no_grad()
def test_a_second_term_reads_the_first_below_a_bound(keyed):
    gm = flat(2, keyed)
    before, expected = operators(gm), gm(*INPUTS)
    assert bound_first_terms(gm).modified
    assert Counter(operators(gm)) - Counter(before) == Counter(clamp_max=1)
    (bound,) = [n for n in gm.graph.nodes if op_name(n) == "clamp_max"]
    assert op_name(bound.args[0]) == "dequantize_per_tensor"
    assert torch.equal(torch.cat(gm(*INPUTS)), torch.cat(expected))
    assert not bound_first_terms(gm).modified


def test_what_no_difference_reads_is_not_bounded():
    assert not bound_first_terms(flat(1, "all")).modified
