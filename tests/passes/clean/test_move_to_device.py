"""Device arguments and fake values that say another device. A machine needs none for it."""

import torch

from benchmarks.networks.small import TinyUNet, captured
from tfmq_fx.graph.nodes import meta_value
from tfmq_fx.passes import move_to_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def fakes(gm):
    values = [meta_value(n) for n in gm.graph.nodes]
    return [x for x in values if isinstance(x, torch.Tensor)]


def test_arguments_and_fake_values_say_the_device():
    gm = captured(TinyUNet)
    code, shapes = gm.code, [(x.shape, x.stride(), x.dtype) for x in fakes(gm)]
    assert "device(type='cpu')" in code
    assert move_to_device(gm, device=CUDA).modified
    assert "device(type='cpu')" not in gm.code
    assert {x.device for x in fakes(gm)} == {CUDA}
    assert [(x.shape, x.stride(), x.dtype) for x in fakes(gm)] == shapes
    assert not move_to_device(gm, device=CUDA).modified
    assert move_to_device(gm, device=CPU).modified
    assert gm.code == code
    assert {x.device for x in fakes(gm)} == {CPU}
