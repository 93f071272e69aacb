"""Hold tensors in files that are mapped to memory, so that the kernel reads them as they are needed, and can drop them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import raw_bytes


def on_disk(x: Tensor, folder: Path | None = None) -> Tensor:
    """Return a copy of `x` on the CPU, in a temporary file without a name, which is gone when the tensor is.

    folder: of the file; None takes the system's temporary folder (TMPDIR). Writing to the tensor does not change the
    file. Raises TFMQError if the file cannot be written.
    """
    if not x.numel():
        return x
    try:
        with tempfile.NamedTemporaryFile(prefix="tfmq-", dir=folder) as file:
            # Write instead of mapping the file, so that a full disk raises OSError instead of a bus error.
            file.write(raw_bytes(x))
            file.flush()
            flat = torch.from_file(file.name, shared=False, size=x.numel(), dtype=x.dtype)
    except OSError as error:
        raise TFMQError(
            f"{folder or tempfile.gettempdir()}: weights cannot be written there ({os.strerror(error.errno or 0)}); "
            "take a larger disk (TMPDIR for temporary files), or raise max_memory."
        ) from error
    return flat.reshape(x.shape)


def outgrows(size: float, limit: float, what: str, remedy: str) -> bool:
    """Return True if `size` bytes are more than `limit`, so that they must lie on disk; see `require_free`."""
    if size > limit:
        require_free(size, what, remedy)
    return size > limit


def require_free(size: float, what: str, remedy: str) -> None:
    """Raise TFMQError if the system's temporary folder has less than `size` bytes free. what: needs them; remedy: the end."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise TFMQError(
            f"{what} about {size / 2**30:.1f} GiB of disk beyond max_memory, but {folder} has {free / 2**30:.1f}; {remedy}, or "
            "set TMPDIR to a larger disk."
        )
