"""A quantized network, saved and loaded or not, returns what the float one returns."""

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import tfmq_fx
from benchmarks.networks.small import vectors
from tfmq_fx.artefact.outputs import describe_output, output_class
from tfmq_fx.base.errors import TFMQError

NEAREST = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Fields:
    sample: Any
    more: Any = None


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make, self.time, self.out = make, nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        return self.make(self.out((sample + self.time(timestep.reshape(-1, 1).float() / 1000)).relu()))


def shape_of(value):
    """The types of nested values, by name: classes of the network's own code are made anew."""
    if dataclasses.is_dataclass(value):
        return type(value).__name__, [shape_of(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return type(value).__name__, {k: shape_of(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [shape_of(v) for v in value]
    return "tensor" if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: [y, 3],
        lambda y: {"a": y, "b": (y, "word")},
        lambda y: Pair(y, None),
        lambda y: Fields(y),
        lambda y: BaseModelOutput(last_hidden_state=y),
    ],
    ids=["tensor", "tuple", "list", "dict", "namedtuple", "dataclass", "mapping"],
)
def test_outputs_have_the_float_networks_type(make, tmp_path):
    network = Returns(make).eval()
    q = tfmq_fx.quantize(network, NEAREST, calibration=vectors())
    q.save_pretrained(tmp_path / "q")
    x, t = torch.randn(3, 4), torch.tensor([0, 100, 200])
    expected = shape_of(network(x, t))
    assert shape_of(q(x, t)) == expected == shape_of(tfmq_fx.load(tmp_path / "q")(x, t))


def test_fields_are_read_by_name():
    made = output_class(*describe_output(Fields(1, 2)))(sample=5)
    assert (made.sample, made.more) == (5, None)
    assert output_class(*describe_output(Pair(1, 2)))(3, 4).second == 4
    assert describe_output((1, 2)) == describe_output({"a": 1}) == describe_output([1]) == (None, ())


def test_an_artefact_names_no_class_to_import_and_no_code():
    for name, fields in (("modeling.Output", ()), ("dataclass A", ("x=1",)), ("namedtuple a-b", ("x",))):
        with pytest.raises(TFMQError, match=r"config\.json: output type"):
            output_class(name, fields)
