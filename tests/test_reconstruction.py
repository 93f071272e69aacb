import dataclasses

import pytest
import torch

import tfmq_fx
from tests.networks import FAST, calibration, prepared
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import weight_argument
from tfmq_fx.observers import PerChannelWeightFakeQuantize
from tfmq_fx.passes.find_blocks import find_blocks
from tfmq_fx.passes.prepare import observers


def integers(gm):
    return {
        str(n.args[0].target): o.q.clone()
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
    }


def weights_of(block):
    found = []
    for node in block.nodes:
        index = weight_argument(node)
        if index is not None:
            source = node.args[index]
            while source.op != "get_attr":
                source = source.args[0]
            found.append(str(source.target).removesuffix(".weight"))
    return found


def test_blocks_are_the_residual_and_attention_blocks_then_single_layers():
    assert sorted(weights_of(b) for b in find_blocks(prepared())) == [
        ["attention.qkv", "attention.out"],
        ["conv_in"],
        ["conv_out"],
        ["down"],
        ["down_block.conv1", "down_block.conv2"],
        ["up_block.conv1", "up_block.conv2", "up_block.skip"],
    ]


def test_every_block_gets_no_worse_and_most_get_better():
    gm = prepared()
    before = integers(gm)
    tfmq_fx.reconstruct(gm, calibration())
    results = gm.meta["reconstruction"]
    assert results[0].name == "temporal_block"
    assert len(results) == 7
    assert all(r.error <= r.error_nearest for r in results)
    assert results[0].error < 0.7 * results[0].error_nearest
    after = integers(gm)
    assert before.keys() == after.keys()
    # AdaRound rounds down or up: no integer moves by more than one from nearest.
    assert all((after[k].int() - before[k].int()).abs().max() <= 1 for k in after)
    assert any(not torch.equal(after[k], before[k]) for k in after)
    assert all(p.requires_grad and p.grad is None for p in gm.parameters())  # the network is as it was


def test_the_same_seed_gives_the_same_integers():
    runs = []
    for _ in range(2):  # at one thread count: another one adds floats in another order
        gm = prepared()
        tfmq_fx.reconstruct(gm, calibration(), seed=7)
        runs.append(integers(gm))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_nearest_learns_nothing():
    gm = prepared()
    before = integers(gm)
    tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(FAST, method="nearest"))
    assert all(torch.equal(before[k], v) for k, v in integers(gm).items())


def test_a_loss_that_becomes_nan_names_the_block():
    gm = prepared()
    observer = next(
        o
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize) and "attention.qkv" in str(n.args[0].target)
    )
    observer.scale.fill_(torch.nan)
    with pytest.raises(TFMQError, match=r"block attention\.qkv\.weight: the loss became nan"):
        tfmq_fx.reconstruct(gm, calibration())


@pytest.mark.parametrize("change", [{"method": "magic"}, {"iterations": 0}, {"batch_size": -1}])
def test_bad_settings_are_refused(change):
    with pytest.raises(TFMQError, match=rf"Reconstruction\.{next(iter(change))}"):
        dataclasses.replace(FAST, **change)
