"""Small networks quantized by rounding to nearest. Each is quantized once."""

import dataclasses
import functools

import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, Labelled, TinyUNet, calibration, labelled_data, make, vectors
from tfmq_fx.artefact.interface import Interface
from tfmq_fx.model import QuantizedModel
from tfmq_fx.recipe import AUTO, SHARES


def recipe(bits, keyed="block", **changes):
    """Return a round-to-nearest recipe: the graph does not depend on how the weights are rounded.

    Nothing is left to choose, so that all layers are of one kind.
    """
    preset = tfmq_fx.Recipe.preset(bits)
    closed = {
        "keyed": keyed,
        **dict.fromkeys(SHARES, 0.0),
        "reconstruction": tfmq_fx.Reconstruction(method="nearest"),
    }
    if preset.smooth == AUTO:
        closed |= {"smooth": None, "activation_observer": "mse"}
    return dataclasses.replace(preset, **{**closed, **changes})


@functools.cache
def labelled(bits, keyed="block"):
    return tfmq_fx.quantize(
        make(Labelled),
        recipe(bits, keyed),
        calibration=labelled_data(),
        finite={"class_labels": range(Labelled.classes)},
    )


@functools.cache
def one_timestep(network_class: type[nn.Module]):
    """Quantize a network by single passes, with a timestep of shape () in the example.

    The result is called as the network is.
    """
    network, settings = make(network_class), recipe("w8a8")
    example = {"sample": torch.randn(2, 4), "timestep": torch.tensor(7)}
    gm = tfmq_fx.capture(network, example)
    prepared = tfmq_fx.prepare(gm, settings, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, vectors())
    face = Interface.of(network, gm, example)
    return QuantizedModel(
        tfmq_fx.convert(prepared),
        interface=face,
        timesteps=TIMESTEPS,
        config={},
        recipe=settings.to_json(),
        report={},
    )


@functools.cache
def quantized(bits="w8a8", keyed="block", network_class=TinyUNet, **changes):
    return tfmq_fx.quantize(make(network_class), recipe(bits, keyed, **changes), calibration=calibration())
