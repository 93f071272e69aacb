"""torch's settings are put aside and given back."""

import threading

import pytest
import torch

from tests.helpers.settings import SETTINGS
from tfmq_fx.base.ambient import neutral, tracked


def settings():
    return (
        torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.get_default_device(),
    )  # fmt: skip


PLAIN = (False, False, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_off_inside_and_back_afterwards(name):
    with SETTINGS[name]():
        before = settings()
        with neutral():
            assert settings() == PLAIN
        assert settings() == before
        with pytest.raises(ZeroDivisionError), neutral():
            raise ZeroDivisionError
        assert settings() == before
    assert settings() == PLAIN


def test_it_decorates():
    @neutral()
    def dtype():
        return torch.zeros(1).dtype

    with SETTINGS["default dtype bfloat16"]():
        assert (dtype(), dtype(), torch.zeros(1).dtype) == (torch.float32, torch.float32, torch.bfloat16)


def test_the_default_dtype_comes_back_when_the_last_thread_is_done():
    """It is one for all threads: the first to end must not take it from the other."""
    entered, left = threading.Event(), threading.Event()

    def other():
        with neutral():
            entered.set()
            left.wait(10)
            found.append(torch.get_default_dtype())

    found = []
    thread = threading.Thread(target=other)
    with SETTINGS["default dtype bfloat16"]():
        with neutral():
            thread.start()
            entered.wait(10)
        left.set()
        thread.join()
        assert found == [torch.float32]
        assert torch.get_default_dtype() == torch.bfloat16


def test_a_tensor_of_inference_mode_is_tracked_on_the_same_memory():
    with torch.inference_mode():
        x = torch.randn(3, 4)[1:].T
        y = tracked(x)
    assert x.is_inference()
    assert not y.is_inference()
    assert torch.equal(x, y)
    assert (y.data_ptr(), y.stride()) == (x.data_ptr(), x.stride())
    y.clone().requires_grad_().mul(y).sum().backward()
    assert tracked(y) is y
