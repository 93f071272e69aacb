"""Find out which GPU there is, and whether its int8 kernels can run on it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from tfmq_fx.base.errors import TFMQError

# Tensor cores multiply bytes since 7.5, but Triton 3.6 no longer compiles such products for 7.5.
LEAST = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU that a network is lowered to."""

    device: torch.device
    name: str
    capability: tuple[int, int]


def require_gpu() -> Gpu:
    """Return the current GPU. Raises TFMQError, in one line, where no int8 kernel can run."""
    if not torch.cuda.is_available():
        raise TFMQError('target "cuda": torch finds no CUDA device here; use target "cpu".')
    if find_spec("triton") is None:
        raise TFMQError('target "cuda": Triton is not installed; pip install triton, or use target "cpu".')
    capability = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if capability < LEAST:
        found, least = (".".join(map(str, c)) for c in (capability, LEAST))
        raise TFMQError(
            f'target "cuda": {name} has compute capability {found}, and the int8 kernels need {least}; use target "cpu".'
        )
    return Gpu(device=torch.device("cuda", torch.cuda.current_device()), name=name, capability=capability)
