"""A prepared graph can be moved, but not cast: its scales are float32, and its code has one dtype."""

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, TinyUNet, make, prepared
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.observers import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.recipe import Recipe

CASTS = {
    "half": lambda gm: gm.half(),
    "bfloat16": lambda gm: gm.bfloat16(),
    "double": lambda gm: gm.double(),
    "to": lambda gm: gm.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_is_refused(cast):
    with pytest.raises(TFMQError, match="prepared graph has the dtype that it was captured in"):
        CASTS[cast](prepared())


def test_what_changes_no_dtype_is_not():
    gm = prepared()
    scales = [o.scale for _, o in observers(gm) if isinstance(o, PerChannelWeightFakeQuantize)]
    assert gm.float().to("cpu").to("cpu", torch.float32) is gm
    assert all(s.dtype == torch.float32 for s in scales)


def test_a_network_in_half_precision_stays_so():
    network = make(TinyUNet).bfloat16()
    for module in network.modules():
        if isinstance(module, nn.Linear):  # the timestep is embedded in float32
            module.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    example = {"sample": torch.randn(2, 1, 8, 8).bfloat16(), "timestep": torch.tensor([100, 200])}
    gm = tfmq_fx.prepare(tfmq_fx.capture(network, example), Recipe.preset("w4a8"), timesteps=TIMESTEPS)
    with pytest.raises(TFMQError, match="float32"):
        gm.float()
