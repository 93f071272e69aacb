"""Run a short reconstruction with tuning, and compare two of them."""

import dataclasses

import torch

import tfmq_fx
from benchmarks.networks.small import FAST, calibration, prepared
from tfmq_fx.observers import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.observed import observers

TUNED = dataclasses.replace(FAST, tune_iterations=10)


def integers(gm):
    """Return the integers and scales of every weight."""
    return {
        str(n.args[0].target) + kind: getattr(o, kind)
        for n, o in observers(gm)
        if isinstance(o, PerChannelWeightFakeQuantize)
        for kind in ("q", "scale")
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def reconstructed(state=None, **changes):
    gm = prepared()
    return tfmq_fx.reconstruct(gm, calibration(), dataclasses.replace(TUNED, **changes), seed=0, state=state)
