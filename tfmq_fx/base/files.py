"""Write files that are absent, unchanged or complete at any time; digest and check their contents."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tfmq_fx.base.errors import TFMQError, first_line

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # in a folder of `keep_folder`: name -> length and sha256 of every other file


def raw_bytes(x: Tensor) -> memoryview:
    """Return the bytes of a tensor of any type and device, in row-major order."""
    data: memoryview = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def update_with_tensors(digest: hashlib._Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add names, types, shapes and bytes to `digest`, in the order given."""
    for name, x in tensors:
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(raw_bytes(x))


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_writable(target: Path) -> None:
    """Raise TFMQError, naming `target`, if no file or folder of that name could be written now. Nothing is left there.

    For the start of long work.
    """
    with _naming(target):
        real = _real(target)
        there = next(p for p in real.parents if p.exists())
        longest = os.pathconf(there, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > longest for part in real.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.rmdir(_temporary(there))


def _real(target: Path) -> Path:
    """Return the absolute path without links: what a link points to is written, and the link stays."""
    return Path(os.path.realpath(target))


def _temporary(parent: Path) -> Path:
    """Make a folder with a new name in `parent`, with the permissions that new folders get here."""
    folder = parent / f".tfmq-{secrets.token_hex(8)}"
    folder.mkdir()
    return folder


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Convert every error of the disk, and of names that no file can have, to a TFMQError that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises its own type for a full disk
        raise TFMQError(f"{target}: cannot be written ({first_line(error)}).") from error


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Make a temporary folder beside `target`. Raises TFMQError, naming `target`, for every error of the disk."""
    with _naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target.parent)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _usual_permissions(folder: Path) -> None:
    """Give the files in a folder the permissions that new files get here. Some libraries write them for the owner alone."""
    probe = folder / ".permissions"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


def _anything(_: Path) -> bool:
    return True


def replace_folder(
    folder: Path, write: Callable[[Path], None], *, replaces: Callable[[Path], bool] = _anything
) -> None:
    """Let `write` fill a temporary folder, then rename it, so that `folder` is absent, unchanged or complete.

    replaces: is asked about a folder that is there when the new one is written. False keeps it and drops the
        new one.

    If several processes write the same folder at once, the last one wins. Replacing a folder takes two
    renames, and between them it is absent for some microseconds: Python has no call to exchange two names.
    A link stays, and the folder that it points to is written. Raises TFMQError when the folder cannot be written.
    """
    folder = _real(folder)
    with _beside(folder) as temporary:
        write(temporary)
        _usual_permissions(temporary)
        _move(temporary, folder, replaces)


def keep_folder(folder: Path, write: Callable[[Path], None]) -> bool:
    """Return True if `folder` is as it was written; otherwise let `write` fill it anew, and return False.

    It gets a manifest with the length and sha256 of every file. A folder that differs from its manifest is
    replaced, with one warning that names the files. Of several processes that write it at once, the first
    wins. Raises TFMQError when the folder cannot be written.
    """
    if folder.is_dir():
        if not (names := damaged(folder)):
            return True
        log.warning("%s: damaged or missing: %s; it is made anew", folder, ", ".join(names))

    def write_with_manifest(new: Path) -> None:
        write(new)
        entries = {f.name: _entry(f) for f in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")

    replace_folder(folder, write_with_manifest, replaces=lambda there: bool(damaged(there)))
    return False


def damaged(folder: Path) -> list[str]:
    """Return the names of a folder's files that differ from its manifest; the manifest's own if it is damaged."""
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return [MANIFEST]
    if not isinstance(entries, dict) or not entries:
        return [MANIFEST]
    return [name for name, entry in entries.items() if _entry(folder / name, entry) != entry]


def _entry(file: Path, expected: Any = None) -> dict[str, Any] | None:
    """Return a file's entry in a manifest; None if the file cannot be read or has not the length expected."""
    try:
        length = file.stat().st_size
        if isinstance(expected, dict) and expected.get("bytes") != length:
            return None
        return {"bytes": length, "sha256": sha256_of(file)}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def replace_files(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create `file` and any files beside it in a temporary folder, then move them into place.

    `file` moves last, so that it is absent, unchanged or complete at any time. If it is a link, it stays, and
    what it points to is written. Raises TFMQError when it cannot be written.
    """
    file = _real(file)
    with _beside(file) as temporary:
        write(temporary / file.name)
        _usual_permissions(temporary)
        written = sorted(temporary.iterdir(), key=lambda f: f.name == file.name)
        if len(written) > 1:
            file.unlink(missing_ok=True)  # an old file must never lie beside new data
        for part in written:
            os.replace(part, file.with_name(part.name))


def _move(temporary: Path, folder: Path, replaces: Callable[[Path], bool]) -> None:
    """Rename `temporary` to `folder`, replacing what is there, even while other processes write it too.

    replaces: as in `replace_folder`.
    """
    old: list[Path] = []
    try:
        while True:
            try:
                os.rename(temporary, folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or len(old) > 100:
                    raise
                if not replaces(folder):
                    return
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
