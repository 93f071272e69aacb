"""What is known of a float graph."""

import torch

import tfmq_fx
from benchmarks.networks.small import TinyUNet, captured, make
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.graph.state import Captured, Change, captured_of, set_state
from tfmq_fx.passes import low_rank, rotate


def test_nothing_is_known_of_a_graph_that_nobody_captured_here():
    gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    assert captured_of(gm) == Captured()


def test_capture_records_the_timestep_and_copies_have_states_of_their_own():
    gm = captured()
    assert captured_of(gm) == Captured(timestep="timestep")
    copy = fresh(gm)
    set_state(copy, Captured(timestep="other"))
    assert captured_of(gm).timestep == "timestep"


def test_low_bit_passes_add_to_what_is_known():
    gm = tfmq_fx.capture(
        make(TinyUNet), {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([0, 100])}
    )
    rotate(gm, block=4)
    before = captured_of(gm)
    low_rank(gm, rank=2)
    assert list(before.low_bits) == ["rotate"]  # the old value is as it was
    assert list(captured_of(gm).low_bits) == ["rotate", "low_rank"]
    assert all(isinstance(c, Change) for changes in captured_of(gm).low_bits.values() for c in changes)
