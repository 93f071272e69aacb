"""Which GPU can run int8 kernels, and what is said where none can."""

import pytest
import torch

from tests.helpers.nearest import quantized
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.runtimes import cuda


@pytest.fixture
def card(monkeypatch):
    """A GPU of compute capability 9.0, as far as torch tells."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "find_spec", lambda name: name)


@pytest.mark.usefixtures("card")
def test_the_current_gpu_is_taken():
    assert cuda.require_gpu() == cuda.Gpu(device=torch.device("cuda:1"), name="Card", capability=(9, 0))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("module", "name", "value", "words"),
    [
        (torch.cuda, "is_available", lambda: False, "torch finds no CUDA device here"),
        (cuda, "find_spec", lambda _: None, "Triton is not installed"),
        (torch.cuda, "get_device_capability", lambda: (7, 0), "Card has compute capability 7.0, .* need 8.0"),
    ],
)  # fmt: skip
def test_where_it_cannot_run_one_line_says_why(module, name, value, words, monkeypatch):
    monkeypatch.setattr(module, name, value)
    with pytest.raises(TFMQError, match=f'^target "cuda": .*{words}.*use target "cpu".$') as found:
        quantized().lower("cuda")
    assert "\n" not in str(found.value)
