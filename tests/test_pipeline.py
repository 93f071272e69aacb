"""quantize: what it needs, and what it reports."""

import pytest

import tfmq_fx
from benchmarks.networks.small import TinyUNet, calibration, make
from tfmq_fx.base.errors import TFMQError


def test_the_report_lists_everything(tiny):
    report = tiny.report
    network = make(TinyUNet)
    layers = {layer["path"] for layer in report["layers"]}
    floats = {f["name"] for f in report["float"]}
    assert layers | floats >= {name for name, _ in network.named_parameters()}
    assert {"input of conv_in.weight", "input of conv_out.weight"} <= floats
    assert any("scaled_dot_product_attention" in f for f in floats)
    assert report["temporal_block"] == {
        "features": 2,
        "timesteps": 10,
        "finite": {},
        "keys": {"linear_2": ["timestep"], "linear_5": ["timestep"]},
    }
    assert len(report["errors_by_timestep"]) == 10
    assert report["sizes"]["quantized_weights"] + report["sizes"]["float_parameters"] == sum(
        p.numel() for p in network.parameters()
    )
    assert {r["kept"] for r in report["reconstruction"]} <= {"learned", "gptq", "nearest"}


def test_a_network_without_calibration_data_is_refused():
    with pytest.raises(TFMQError, match="a network alone has no trajectories"):
        tfmq_fx.quantize(make(TinyUNet))


def test_unknown_recipes_show_the_nearest():
    with pytest.raises(TFMQError, match="'w4a9' is not a preset; presets are w4a8"):
        tfmq_fx.quantize(make(TinyUNet), "w4a9", calibration=calibration())
