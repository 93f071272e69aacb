"""Who quantizes which layer."""

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, calibration
from tests.helpers.graphs import RECIPE, T, X, exported
from tfmq_fx.observers import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.state import state_of


def test_another_quantizer_takes_the_data_path_and_ours_keeps_the_block():
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    gm, _ = exported()
    x86 = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS, data_quantizer=x86)
    weights = {
        str(n.args[0].target) for n, o in observers(prepared) if isinstance(o, PerChannelWeightFakeQuantize)
    }
    block = {"time_mlp.0.weight", "time_mlp.2.weight", "down_block.emb.weight", "up_block.emb.weight"}
    assert weights == block
    assert {layer.path for layer in state_of(prepared).plan.layers} == block
    theirs = {
        n.name for n in state_of(prepared).plan.notes if n.reason == "annotated by X86InductorQuantizer"
    }
    left = [
        f for f in state_of(prepared).plan.floats if f.reason == "X86InductorQuantizer does not annotate it"
    ]
    assert len(theirs) + len(left) == 10  # every other convolution and linear is one or the other
    if not theirs:
        pytest.skip(
            "this torch's export leaves no source for X86InductorQuantizer to match; reported as float"
        )
    tfmq_fx.calibrate(prepared, calibration())
    tfmq_fx.reconstruct(prepared, calibration())
    assert [r.name for r in state_of(prepared).reconstruction] == ["temporal_block"]
    q = tfmq_fx.convert(prepared)
    with torch.no_grad():
        error = (q(X, T) - gm(X, T)).square().mean() / gm(X, T).square().mean()
    assert 0 < error < 0.003
    assert not any(
        x.dtype == torch.float32 and x.dim() > 1 for x in q.state_dict().values()
    )  # their weights are folded
