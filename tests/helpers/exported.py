"""Networks to export, and functions to run the files in their own runtimes."""

import functools

import torch

from benchmarks.networks.small import TIMESTEPS, ScalarTime, TinyUNet
from tests.helpers import nearest
from tests.helpers.nearest import one_timestep

SIZES = (1, 2, 5)


def quantized(network_class=TinyUNet, bits="w4a8", **changes):
    return nearest.quantized(bits, network_class=network_class, **changes)


@functools.cache
def scalar():
    """Return the quickest network to export: linears, and a timestep of shape ()."""
    return one_timestep(ScalarTime)


def session(file):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def rows(size):
    """Return noise and a batch of mixed timesteps."""
    x = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(size))
    return {"sample": x, "timestep": TIMESTEPS[torch.arange(size) * 3 % 10]}
