"""Parameters that the compiler lifted to inputs."""

import pytest
import torch

from benchmarks.networks.small import TinyUNet, make
from tests.helpers.graphs import T, X, compiled
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.passes import bind_parameters


def test_binding_takes_what_the_compiler_lifted():
    gm, _ = compiled()
    assert list(placeholders(gm)) == ["L_timestep_", "L_sample_"]
    assert not bind_parameters(gm, example_inputs=[T, X]).modified
    with torch.no_grad():
        (got,) = gm(T, X)
        assert torch.equal(got, make(TinyUNet)(X, T))


def test_binding_needs_an_example_of_every_input():
    gm, _ = compiled()
    with pytest.raises(TFMQError, match="example_inputs: 1 given, the graph takes 2"):
        bind_parameters(gm, example_inputs=[T])
