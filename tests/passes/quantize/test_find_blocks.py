"""The blocks that are reconstructed one at a time."""

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, calibration, captured, prepared
from tests.helpers.blocks import weights_of
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.passes import find_temporal
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.quantize.find_blocks import find_blocks
from tfmq_fx.pipeline import low_bits

ALL = {"smooth": 0.5, "rotate": 4, "low_rank": 2}


def test_blocks_are_the_residual_and_attention_blocks_then_single_layers():
    assert sorted(weights_of(b) for b in find_blocks(prepared())) == [
        ["attention.qkv", "attention.out"],
        ["conv_in"],
        ["conv_out"],
        ["down"],
        ["down_block.conv1", "down_block.conv2"],
        ["up_block.conv1", "up_block.conv2", "up_block.skip"],
    ]


def test_blocks_hold_the_same_layers():
    temporal = find_temporal(captured())
    passes = low_bits(tfmq_fx.Recipe(**ALL), temporal=temporal, calibration=calibration())
    gm = PassManager(passes)(fresh(captured())).graph_module
    kept = lambda paths: [p for p in paths if "low_rank" not in p]  # noqa: E731
    found = tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    assert sorted(kept(weights_of(b)) for b in find_blocks(found) if kept(weights_of(b))) == sorted(
        weights_of(b) for b in find_blocks(prepared())
    )
