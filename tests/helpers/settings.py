"""Settings of torch that a caller's program may have on."""

from contextlib import ExitStack, contextmanager

import pytest
import torch


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "deterministic algorithms": deterministic,
}


@contextmanager
def together():
    """Turn on all of `SETTINGS`. Of the two default dtypes, the last one holds."""
    with ExitStack() as stack:
        for setting in SETTINGS.values():
            stack.enter_context(setting())
        yield


# What CI runs is all of them together; which one it is, if that fails, the slow ones tell.
EACH = [
    pytest.param(together, id="together"),
    *(pytest.param(s, id=n, marks=pytest.mark.slow) for n, s in SETTINGS.items()),
]
