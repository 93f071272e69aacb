"""One small network as the graphs of three frontends."""

import dataclasses

import torch
from torch.fx import symbolic_trace

import tfmq_fx
from benchmarks.networks.small import FAST, TinyUNet, calibration, make
from tfmq_fx.passes import bind_parameters, inline_modules

BATCH = calibration().tensors
X, T = BATCH["sample"][:20], BATCH["timestep"][:20]
RECIPE = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=FAST)


def exported():
    return tfmq_fx.capture(make(TinyUNet), {"sample": X, "timestep": T}), None


def traced():
    gm = symbolic_trace(make(TinyUNet))
    assert inline_modules(gm).modified
    return gm, None


def compiled():
    """Return the graph that a torch.compile backend gets, with parameters bound, and how to call it."""
    kept = []

    def backend(gm, example_inputs):
        kept.append(bind_parameters(gm, example_inputs=example_inputs).graph_module)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(make(TinyUNet), backend=backend)(X, T)
    (gm,) = kept
    return gm, "L_timestep_"
