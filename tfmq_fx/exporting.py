"""One door for every file format that a quantized network can be written to."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfmq_fx.errors import TFMQError
from tfmq_fx.model import QuantizedModel

# format -> the suffix that names it; "" is a folder
SUFFIXES = {"pt2": ".pt2", "aot": ".pt2", "onnx": ".onnx", "onnxruntime": ".onnx", "openvino": ""}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what is known of how it will run."""

    format: str  # a key of SUFFIXES
    file: Path  # or folder
    bytes: int  # of all files together
    seconds: float
    weights: Mapping[str, int] = field(default_factory=dict)  # "int4" -> how many weights are stored so
    kernels: Mapping[str, int] = field(default_factory=dict)  # "int8", "float" -> layers, where the file fixes it
    notes: tuple[str, ...] = ()  # what somebody who expects int8 everywhere should know


def export(model: QuantizedModel, file: str | Path, *, format: str | None = None, **settings: Any) -> Exported:
    """Write the quantized network for another runtime; the file is absent, as it was, or whole.

    format: "pt2" torch.export; "aot" a package compiled by AOTInductor; "onnx" standard QDQ; "onnxruntime" QDQ in the
        shape that onnxruntime's CPU computes in bytes; "openvino" a folder. None: .pt2, .onnx (then "onnxruntime") or
        a folder, by the file's name.
    settings: of the format; "aot" takes `batch`.

    Raises TFMQError for an unknown format or suffix, for a package or compiler that is missing, and naming the node
    that the format cannot express.
    """
    file = Path(file)
    chosen = format or _by_suffix(file)
    if chosen not in SUFFIXES:
        raise TFMQError(f"export: format={chosen!r} is unknown; use {', '.join(SUFFIXES)}, or None.")
    if file.suffix != SUFFIXES[chosen]:
        wanted = f"a name that ends in {SUFFIXES[chosen]}" if SUFFIXES[chosen] else "a folder without suffix"
        raise TFMQError(f"export: {file.name}: format {chosen!r} needs {wanted}.")
    if settings and chosen != "aot":
        raise TFMQError(f"export: {next(iter(settings))}: format {chosen!r} has no such setting.")
    start = time.perf_counter()
    found = _WRITERS[chosen](model, file, **settings)
    size = sum(f.stat().st_size for f in _files(file))
    return Exported(
        format=chosen, file=file, bytes=size, seconds=time.perf_counter() - start, **found
    )


def _by_suffix(file: Path) -> str:
    by_suffix = {".pt2": "pt2", ".onnx": "onnxruntime", "": "openvino"}
    if file.suffix not in by_suffix:
        raise TFMQError(
            f"export: {file.name}: the suffix {file.suffix!r} is not supported; use .pt2, .onnx, or a folder."
        )
    return by_suffix[file.suffix]


def _files(file: Path) -> list[Path]:
    """The exported file and what lies beside it under its name."""
    return [f for f in file.iterdir()] if file.is_dir() else sorted(file.parent.glob(f"{file.name}*"))


def _pt2(model: QuantizedModel, file: Path) -> dict[str, Any]:
    from tfmq_fx.saving import export_pt2

    export_pt2(model, file)
    return {}


def _openvino(model: QuantizedModel, folder: Path) -> dict[str, Any]:
    from tfmq_fx.lowering_openvino import export_folder

    export_folder(model, folder)
    return {}


def _onnx(model: QuantizedModel, file: Path) -> dict[str, Any]:
    from tfmq_fx.export_onnx import export_onnx

    return export_onnx(model, file, for_onnxruntime=False)


def _onnxruntime(model: QuantizedModel, file: Path) -> dict[str, Any]:
    from tfmq_fx.export_onnx import export_onnx

    return export_onnx(model, file, for_onnxruntime=True)


def _aot(model: QuantizedModel, file: Path, *, batch: int | None = None) -> dict[str, Any]:
    from tfmq_fx.export_aot import export_aot

    return export_aot(model, file, batch=batch)


_WRITERS: dict[str, Callable[..., dict[str, Any]]] = {
    "pt2": _pt2, "aot": _aot, "onnx": _onnx, "onnxruntime": _onnxruntime, "openvino": _openvino,
}  # fmt: skip


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
