"""How one block's weights are rounded."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import FAST, TIMESTEPS, TinyUNet, calibration, make, prepared
from tests.helpers import low_bits
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.parallel import Ranks, Workers
from tfmq_fx.calibration.data import inputs_of
from tfmq_fx.observers import PerChannelWeightFakeQuantize, StaticFakeQuantize
from tfmq_fx.passes.quantize.observed import observers, without_observers
from tfmq_fx.passes.quantize.state import state_of, temporal_of
from tfmq_fx.reconstruction.gptq import Moments
from tfmq_fx.reconstruction.rounding import choose_rounding
from tfmq_fx.reconstruction.streams import Part, Streams


def test_learned_activation_scales_move_and_win_at_four_bits():
    errors = {}
    for learn in (False, True):
        gm = prepared(weight_bits=4, activation_bits=4)
        scales = {n.name: o.scale.clone() for n, o in observers(gm) if isinstance(o, StaticFakeQuantize)}
        tfmq_fx.reconstruct(
            gm, calibration(), dataclasses.replace(FAST, iterations=200, learn_activation_scale=learn)
        )
        moved = [
            n.name for n, o in observers(gm) if n.name in scales and not torch.equal(o.scale, scales[n.name])
        ]
        assert bool(moved) == learn
        assert all(o.soft is None for _, o in observers(gm) if isinstance(o, StaticFakeQuantize))
        inputs = inputs_of(gm, calibration().tensors)
        with torch.no_grad():
            errors[learn] = F.mse_loss(gm(*inputs), without_observers(gm)(*inputs))
    assert errors[True] < errors[False]


def test_a_loss_that_is_not_finite_names_the_block():
    with pytest.raises(TFMQError, match=r"block conv_in\.weight: the loss became inf at iteration 0"):
        tfmq_fx.reconstruct(
            prepared(), calibration(), dataclasses.replace(FAST, round_weight=1e300, warmup=0.0)
        )
    gm = prepared()
    observer = next(
        o
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize) and "attention.qkv" in str(n.args[0].target)
    )
    observer.scale.fill_(torch.nan)
    with pytest.raises(TFMQError, match=r"block attention\.qkv\.weight: the loss is nan before"):
        tfmq_fx.reconstruct(gm, calibration())


def test_dead_inputs_leave_a_singular_hessian_and_a_finite_result():
    network = make(TinyUNet)
    with torch.no_grad():  # the attention's input, and so its Hessian, is all zeros
        network.attention.norm.weight.zero_()
        network.attention.norm.bias.zero_()
    gm = tfmq_fx.capture(network, {n: x[:2] for n, x in calibration().tensors.items()})
    recipe = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=FAST)
    gm = tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), calibration())
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, method="gptq"))
    assert all(0 <= r.error <= r.error_nearest for r in state_of(gm).reconstruction)
    assert torch.isfinite(tfmq_fx.convert(gm)(**calibration().tensors)).all()


def test_gptq_cuts_hessians_past_gptq_memory_and_says_so():
    gm = prepared()
    settings = dataclasses.replace(FAST, method="gptq", gptq_memory=1e-4)
    tfmq_fx.reconstruct(gm, calibration(), settings)
    results = {r.name: r for r in state_of(gm).reconstruction}
    assert results["down_block.conv1.weight"].hessian_pieces > 1
    assert results["conv_in.weight"].hessian_pieces == 1
    assert all(r.error <= r.error_nearest for r in results.values())
    assert any(r.hessian_pieces > 1 and r.kept == "gptq" for r in results.values())


class Parallel(nn.Module):
    """Two convolutions of other geometry read one input, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = h + self.wide(h) + self.narrow(h)
        return y


def test_layers_share_a_hessian_only_if_they_make_the_same_rows_of_their_input():
    """In a block of its own, a 3x3 and a 1x1 convolution of one input each get the integers that they get alone."""
    data = low_bits.data(image=True)
    gm = low_bits.graph(Parallel, image=True)
    recipe = tfmq_fx.Recipe(edge_activation_bits=8, reconstruction=FAST)
    gm = tfmq_fx.calibrate(tfmq_fx.prepare(gm, recipe, timesteps=TIMESTEPS), data)

    def run(module, _part, _quantized):
        y = module(*data.tensors.values())
        return y if isinstance(y, tuple) else (y,)

    parts = [[Part(0, 1.0, 0, len(data))]]
    streams = Streams(gm, run, parts, workers=Workers(None), ranks=Ranks())
    settings = dataclasses.replace(FAST, method="gptq")
    result = choose_rounding("all", streams, method="gptq", settings=settings, iterations=0, order=lambda: 0)
    assert result.kept == "gptq"
    assert result.error < result.error_nearest


def test_embedding_layers_behind_a_silu_of_their_own_share_a_hessian(monkeypatch):
    gm, made = prepared(), []
    of = Moments.of
    monkeypatch.setattr(Moments, "of", lambda layer, *a, **k: made.append(layer.name) or of(layer, *a, **k))
    settings = dataclasses.replace(FAST, method="nearest", temporal_method="gptq")
    tfmq_fx.reconstruct(gm, calibration(), settings)
    inside = [
        n
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize) and n.name in temporal_of(gm).nodes
    ]
    assert len(inside) == 4  # two of the time embedding, and one of each block
    assert len(made) == 3
