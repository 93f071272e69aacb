"""Which layer gets which bits."""

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, captured, make, sinusoid
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes.quantize.state import state_of


def bits_by_layer(gm):
    return {
        layer.path.removesuffix(".weight"): (layer.weight_bits, layer.activation_bits)
        for layer in state_of(gm).plan.layers
    }


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w8a16", "w4a16", "w4a4", "w3a8", "w2a8"])
def test_every_preset_gives_every_layer_its_bits(name):
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe.preset(name), timesteps=TIMESTEPS)
    weight, activation = (int(b) for b in name[1:].split("a"))
    found = bits_by_layer(gm)
    assert found["conv_in"] == found["conv_out"] == (8, 16)
    assert found["time_mlp.0"] == (8, activation)  # the first time-embedding layer
    others = {path: bits for path, bits in found.items() if path not in ("conv_in", "conv_out", "time_mlp.0")}
    assert set(others.values()) == {(weight, activation)}
    assert {"down", "up_block.skip", "attention.qkv", "attention.out", "down_block.emb"} <= set(others)


class Unprojected(nn.Module):
    """A residual stream that the timestep's embedding is added to without a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(i, o) for i, o in ((3, 8), (8, 8), (8, 8), (8, 3)))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(sample) + sinusoid(timestep, 8)
        x = x + self.a(x)
        y: torch.Tensor = self.last(x + self.b(x))
        return y


def test_layers_behind_others_are_not_the_timesteps_first():
    gm = tfmq_fx.capture(make(Unprojected), {"sample": torch.randn(2, 3), "timestep": TIMESTEPS[:2]})
    gm = tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=TIMESTEPS)
    assert bits_by_layer(gm) == {"first": (8, 16), "a": (4, 8), "b": (4, 8), "last": (8, 16)}


def test_rules_change_bits_and_a_rule_without_a_match_shows_the_nearest():
    rules = (
        tfmq_fx.Rule(pattern="attention.*", weight_bits=8),
        tfmq_fx.Rule(pattern="down.*", weight_bits=16, activation_bits=16),
    )
    gm = tfmq_fx.prepare(captured(), tfmq_fx.Recipe(rules=rules), timesteps=TIMESTEPS)
    assert bits_by_layer(gm)["attention.qkv"] == (8, 8)
    assert bits_by_layer(gm)["down"] == (16, 16)
    assert "down.weight" in {f.name for f in state_of(gm).plan.floats}
    with pytest.raises(TFMQError, match=r"'atention\.\*' matches no layer; nearest are attention"):
        tfmq_fx.prepare(
            captured(), tfmq_fx.Recipe(rules=(tfmq_fx.Rule(pattern="atention.*"),)), timesteps=TIMESTEPS
        )


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            [tfmq_fx.Rule(pattern="down.*", op="linear")],
            r"'down\.\*' matches down\.weight, which is a conv2d, and no linear; change op",
        ),
        ([tfmq_fx.Rule(pattern="attention")], r"'attention' matches no layer, .*; use 'attention\.\*'"),
        (
            [tfmq_fx.Rule(pattern="*"), tfmq_fx.Rule(pattern="down.*")],
            r"'down\.\*' matches only layers that earlier rules match; put it before them",
        ),
    ],
)
def test_a_rule_that_is_no_layers_says_why(rules, words):
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.prepare(captured(), tfmq_fx.Recipe(rules=rules), timesteps=TIMESTEPS)
