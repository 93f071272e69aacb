"""Write files that are absent, unchanged or complete at any time; and digest their contents."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tfmq_fx.base.errors import TFMQError, first_line


def raw_bytes(x: Tensor) -> memoryview:
    """Return the bytes of a tensor of any type and device, in row-major order."""
    data: memoryview = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def update_with_tensors(digest: hashlib._Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add names, types, shapes and bytes to `digest`, in the order given."""
    for name, x in tensors:
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(raw_bytes(x))


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Make a temporary folder beside `target`. Raises TFMQError, naming `target`, for every error of the disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    except OSError as error:
        raise TFMQError(f"{target}: cannot be written ({first_line(error)}).") from error
    try:
        yield temporary
    except (OSError, SafetensorError) as error:  # safetensors raises its own type for a full disk
        raise TFMQError(f"{target}: cannot be written ({first_line(error)}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then rename it, so that `folder` is absent, unchanged or complete.

    If several processes write the same folder at once, the last one wins. Replacing a folder takes two
    renames, and between them it is absent for some microseconds: Python has no call to exchange two names.
    Raises TFMQError when the folder cannot be written.
    """
    folder = folder.absolute()
    with _beside(folder) as temporary:
        write(temporary)
        temporary.chmod(0o755)
        _move(temporary, folder)


def replace_files(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create `file` and any files beside it in a temporary folder, then move them into place.

    `file` moves last, so that it is absent, unchanged or complete at any time. Raises TFMQError when it
    cannot be written.
    """
    with _beside(file) as temporary:
        write(temporary / file.name)
        written = sorted(temporary.iterdir(), key=lambda f: f.name == file.name)
        if len(written) > 1:
            file.unlink(missing_ok=True)  # an old file must never lie beside new data
        for part in written:
            os.replace(part, file.with_name(part.name))


def _move(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`, replacing what is there, even while other processes write it too."""
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
                pass  # another process moved it first
    except OSError:
        if old and not folder.exists():
            os.rename(old.pop(), folder)
        raise
    finally:
        for aside in old:
            shutil.rmtree(aside, ignore_errors=True)


def finite_json(value: Any) -> Any:
    """Return `value` with NaN and infinity replaced by None, because JSON lacks them.

    They come from networks that return zeros, and from the PSNR of equal pictures.
    """
    if isinstance(value, Mapping):
        return {str(k): finite_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
