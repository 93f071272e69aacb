"""A network that lies in a mapped file is quantized, saved, loaded and called without a copy of it in memory."""

import ctypes
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import tfmq_fx
from benchmarks.memory import OwnMemory, anonymous
from benchmarks.networks.small import Deep
from tests.helpers.processes import finish, start
from tfmq_fx.base import arithmetic
from tfmq_fx.observers import weight
from tfmq_fx.recipe import Recipe, Reconstruction

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
M_MMAP_THRESHOLD = -3  # malloc.h
TIMESTEPS = torch.arange(0, 1000, 250).flip(0)


def from_file(width, layers, file):
    """Return a network whose parameters are mapped from `file`, which is written."""
    with torch.device("meta"):
        network = Deep(width, layers)
    save_file({n: torch.randn(p.shape) * p.shape[-1] ** -0.5 for n, p in network.named_parameters()}, file)
    network.load_state_dict(load_file(file), assign=True)
    return network.eval()


def there_and_back(network, folder, method):
    """Quantize, save, load and call a network; return what is quantized to in memory and after loading."""
    rows = torch.randn(8, network.width)
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": rows, "timestep": TIMESTEPS.repeat(2)})
    settings = Reconstruction(method=method, tune_iterations=0, max_memory=1e-4, batch_size=4)
    q = tfmq_fx.quantize(network, Recipe(reconstruction=settings), calibration=data)
    q.save_pretrained(folder)
    given = {"sample": rows[:1], "timestep": TIMESTEPS[:1]}
    with torch.no_grad():
        before = q(**given)
        del q
        return before, tfmq_fx.load(folder, max_memory=1e-4)(**given)


def measured(talk, folder, method, width, layers):
    torch.manual_seed(0)
    weight.search_range = partial(arithmetic.search_range, steps=2)  # only its seconds depend on that
    # What is freed goes back to the system, instead of leaving holes that are counted too.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    there_and_back(
        from_file(width, 2, folder / "small.safetensors"), folder / "small", method
    )  # imports, caches
    network = from_file(width, layers, folder / "large.safetensors")
    size, start = sum(p.nbytes for p in network.parameters()) / 2**30, anonymous()
    with OwnMemory() as memory:
        before, after = there_and_back(network, folder / "large", method)
    talk.send((size, memory.anonymous - start, torch.equal(before, after)))


@pytest.mark.parametrize(
    ("method", "width", "layers"),
    [("nearest", 1024, 12), pytest.param("gptq", 512, 24, marks=pytest.mark.slow)],
)
def test_no_stage_holds_a_copy(tmp_path, method, width, layers):
    """One layer's weights at a time are in memory, a few times over: in float64 for GPTQ."""
    size, most, equal = finish(*start(measured, tmp_path, method, width, layers))
    assert equal
    assert size * 2**30 > layers * 8 * width**2
    assert most < size / 2, f"{most:.3f} GiB beyond what there was, for a network of {size:.3f}"
