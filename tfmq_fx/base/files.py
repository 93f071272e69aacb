"""Files that are absent, as they were, or whole; and digests of what they hold."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tfmq_fx.base.errors import TFMQError, first_line


def raw_bytes(x: Tensor) -> memoryview:
    """The bytes of a tensor of any type and device, in row-major order."""
    data: memoryview = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def update_with_tensors(digest: hashlib._Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Names, types, shapes and bytes, in the order given."""
    for name, x in tensors:
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(raw_bytes(x))


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then rename it: `folder` is absent, as it was, or whole.

    Of several processes that write the same folder at once, the last one's is there afterwards. Between the two renames
    that replace a folder it is absent for some microseconds: Python has no call to exchange two names.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    except OSError as error:
        raise TFMQError(f"{folder}: cannot be written ({error.strerror}).") from error
    try:
        write(temporary)
        temporary.chmod(0o755)
        _move(temporary, folder)
    except (OSError, SafetensorError) as error:  # safetensors has a type of its own for a disk that is full
        raise TFMQError(f"{folder}: cannot be written ({first_line(error)}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`, whatever is there or comes to be there meanwhile; that is removed."""
    old: list[Path] = []
    try:
        while True:
            try:
                os.rename(temporary, folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or len(old) > 100:
                    raise
            try:
                aside = temporary.with_name(f"{temporary.name}-old{len(old)}")
                os.rename(folder, aside)
                old.append(aside)
            except FileNotFoundError:
                pass  # another process was faster
    except OSError:
        if old and not folder.exists():
            os.rename(old.pop(), folder)
        raise
    finally:
        for aside in old:
            shutil.rmtree(aside, ignore_errors=True)


def finite_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them (of a network that gives zeros; the PSNR of equal pictures)."""
    if isinstance(value, Mapping):
        return {str(k): finite_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_files(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` write `file`'s name, and files beside it, in a temporary folder; then move them to their places.

    The files beside it go first: what bears the name of `file` is absent, as it was, or whole.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{file.name}.tmp-", dir=file.parent))
    except OSError as error:
        raise TFMQError(f"{file}: cannot be written ({error.strerror or error}).") from error
    try:
        write(temporary / file.name)
        written = sorted(temporary.iterdir(), key=lambda f: f.name == file.name)
        if len(written) > 1:
            file.unlink(missing_ok=True)  # never an old file beside new data
        for part in written:
            os.replace(part, file.with_name(part.name))
    except OSError as error:
        raise TFMQError(f"{file}: cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
