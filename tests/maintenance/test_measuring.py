"""What a feature's error does to the output, and what its maintenance weighs."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import tfmq_fx
from benchmarks.networks.small import Labelled, TinyUNet, calibration, make
from tests.helpers.maintenance import Nested, features, maintained, prepared, quantized
from tfmq_fx.artefact.saving import WEIGHTS
from tfmq_fx.maintenance.measuring import stored_bytes
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.passes.quantize.state import state_of

T = torch.tensor([900, 0, 300, 300, 100, 800])


def test_the_effect_of_a_feature_is_that_of_its_error_alone():
    """Against the eager network, one embedding layer's output replaced by hand."""
    gm = prepared(maintain="auto")
    with torch.no_grad():
        by_feature = features(gm, timestep=T)
    network, data = make(TinyUNet), calibration().spread(32, seed=0).tensors
    q = tfmq_fx.convert(maintain(gm, calibration()))
    with torch.no_grad():
        wrong = features(prepared(), timestep=data["timestep"])
        exact = network(data["sample"], data["timestep"])
        for i, layer in enumerate((network.down_block.emb, network.up_block.emb)):
            handle = layer.register_forward_hook(lambda *_, i=i: wrong[i])
            error = network(data["sample"], data["timestep"]) - exact
            handle.remove()
            expected = (error.square().sum() / exact.square().sum()).item()
            got = dataclasses.asdict(state_of(q).maintenance)["features"][i]["effect"]["reconstruct"]
            assert got == pytest.approx(expected, rel=1e-3)
    assert len(by_feature) == 2


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        (TinyUNet, {}),
        (TinyUNet, {"bits": "w3a8", "keyed": "all"}),
        (TinyUNet, {"bits": "w4a16"}),
        (Nested, {"cache_type": "int8"}),
        (Labelled, {"cache_type": "int8"}),
    ],
    ids=str,
)
def test_the_bytes_of_the_report_are_those_on_disk(tmp_path, changes, network):
    """Of the whole artefact: what is not temporal is the same in both."""

    def on_disk(q, name):
        kept = {n: x.numel() * x.element_size() for n, x in load_file(tmp_path / name / WEIGHTS).items()}
        assert kept == stored_bytes(q)
        return sum(kept.values())

    found = {}
    for maintenance in ("reconstruct", "cache"):
        gm = maintained(network, maintain=maintenance, **changes)
        if maintenance == "cache":
            claimed = dataclasses.asdict(state_of(gm).maintenance)["bytes"]
        save(gm, tmp_path / maintenance)
        found[maintenance] = on_disk(gm, maintenance)
    assert found["reconstruct"] - found["cache"] == claimed["reconstruct"] - claimed["cache"]
    assert claimed["chosen"] == claimed["cache"]


def save(gm, folder):
    """The weights of a converted graph as `save_pretrained` writes them."""
    model = quantized()
    other = tfmq_fx.QuantizedModel(
        gm, interface=model.interface, timesteps=model.timesteps, config={}, recipe={}, report={}
    )
    other.save_pretrained(folder)
