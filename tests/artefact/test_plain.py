"""What of a network's configuration is kept."""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tfmq_fx.artefact.plain import is_json, plain_config


@dataclasses.dataclass
class Settings:
    channels: int = 8
    kind: torch.dtype = torch.float32
    inner: object = dataclasses.field(
        default_factory=lambda: SimpleNamespace(depth=2, device=torch.device("cpu"))
    )


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (Settings(), {"channels": 8, "inner": {"depth": 2}}),
        (argparse.Namespace(ch=8, limits=(1, 2), bad=[1, torch.int8]), {"ch": 8, "limits": [1, 2]}),
        ({"a": {"b": float("inf"), "c": None}, 3: "x"}, {"a": {"c": None}, "3": "x"}),
        ("a word", {}),
        (None, {}),
    ],
)
def test_a_config_of_any_type_becomes_json(config, kept):
    network = nn.Module()
    network.config = config
    assert plain_config(network) == kept
    json.dumps(plain_config(network), allow_nan=False)
    assert plain_config(nn.Module()) == {}


def test_a_config_that_holds_itself_ends():
    network = nn.Module()
    network.config = SimpleNamespace(a=1)
    network.config.parent = network.config
    assert plain_config(network)["parent"]["parent"]["a"] == 1


def test_json_has_no_infinity():
    assert is_json(1.5)
    assert is_json(True)
    assert not is_json(float("nan"))
    assert not is_json(torch.float32)
