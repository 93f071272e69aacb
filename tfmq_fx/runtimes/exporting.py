"""Export a quantized network to a file, in any of the supported formats."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tfmq_fx.artefact.program import exported, save_program
from tfmq_fx.artefact.quantized_graph import QuantizedGraph
from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files, require_writable
from tfmq_fx.graph.sizes import shown
from tfmq_fx.graph.written import frozen_buffers
from tfmq_fx.runtimes.aot_package import export_aot
from tfmq_fx.runtimes.exported import Exported
from tfmq_fx.runtimes.layers import needs_sizes
from tfmq_fx.runtimes.onnx_file import export_onnx
from tfmq_fx.runtimes.openvino_file import export_folder

log = logging.getLogger(__name__)


# format -> the suffix of its files; "" is a folder
SUFFIXES = {"pt2": ".pt2", "aot": ".pt2", "onnx": ".onnx", "onnxruntime": ".onnx", "openvino": ""}


@neutral()
def export(
    model: QuantizedGraph, file: str | Path, *, format: str | None = None, strict: bool = False
) -> Exported:
    """Write the quantized network for another runtime. The file is absent, unchanged or complete at any time.

    format: "pt2" for torch.export's format; "aot" for a package compiled by AOTInductor; "onnx" for standard
        QDQ; "onnxruntime" for QDQ in the form that lets onnxruntime's CPU compute every quantized layer in
        int8; "openvino" for a folder with OpenVINO's files. None chooses by the file's name: .pt2 ("pt2"),
        .onnx ("onnxruntime") or a folder without suffix ("openvino").
    strict: raise TFMQError when a quantized layer would not run on an int8 kernel. Only "aot", "onnx" and
        "onnxruntime" can tell. Raise it, too, when the network updates buffers that the format would freeze: all
        but "pt2" keep their present values. Without `strict`, the notes say so.

    Raises TFMQError for an unknown format or suffix, for a missing package or compiler, and for a node that
    the format cannot express, naming it.
    """
    file = Path(file)
    chosen = format or _by_suffix(file)
    if chosen not in SUFFIXES:
        raise TFMQError(f"export: format={chosen!r} is unknown; use {', '.join(SUFFIXES)}, or None.")
    if file.suffix != SUFFIXES[chosen]:
        wanted = f"a name that ends in {SUFFIXES[chosen]}" if SUFFIXES[chosen] else "a folder without suffix"
        raise TFMQError(f"export: {file.name}: format {chosen!r} needs {wanted}.")
    if strict and chosen in ("pt2", "openvino"):
        raise TFMQError(
            f"export: strict: which kernels run is not known for format {chosen!r} before it is loaded; "
            'for OpenVINO, q.lower("cpu", strict=True) tells.'
        )
    require_writable(file)  # fail before minutes of tracing
    model, notes = model.closed(strict=strict)
    # Int8 kernels of these formats, or the graph for them, are made for known sizes.
    if chosen in ("aot", "onnxruntime") or (chosen != "pt2" and needs_sizes(model)):
        model, fixed = model.with_fixed_sizes()
        notes = (*notes, *fixed)
    if chosen != "pt2" and (conditions := dict.fromkeys(map(shown, model.interface.conditions))):
        notes = (
            *notes,
            f"the file does not check that sizes are such as the network was captured for: {', '.join(conditions)}",
        )
    frozen = () if chosen == "pt2" else frozen_buffers(model.network, strict=strict)
    start = time.perf_counter()
    found = _WRITERS[chosen](model if chosen == "pt2" else model.in_float32(), file, strict)
    if chosen != "pt2" and model.dtype != torch.float32:
        frozen = (*frozen, f"takes and returns float32 instead of {str(model.dtype).removeprefix('torch.')}")
    exported = Exported(
        format=chosen,
        file=file,
        bytes=sum(f.stat().st_size for f in _files(file)),
        seconds=time.perf_counter() - start,
        **{**found, "notes": (*found.get("notes", ()), *notes, *frozen)},
    )
    log.info("export: %s", exported)
    return exported


def _by_suffix(file: Path) -> str:
    by_suffix = {".pt2": "pt2", ".onnx": "onnxruntime", "": "openvino"}
    if file.suffix not in by_suffix:
        raise TFMQError(
            f"export: {file.name}: the suffix {file.suffix!r} is not supported; use .pt2, .onnx, or a folder."
        )
    return by_suffix[file.suffix]


def _files(file: Path) -> list[Path]:
    """Return the exported file and any weights beside it, or the files in the exported folder."""
    beside = file.with_name(f"{file.name}.data")
    return list(file.iterdir()) if file.is_dir() else [file, *([beside] if os.path.isfile(beside) else [])]


def _pt2(model: QuantizedGraph, file: Path, _strict: bool) -> dict[str, Any]:
    program = exported(model, checked=True)
    replace_files(file, lambda path: save_program(program, path))
    pairs = "torch.export.load gives quantize/dequantize pairs around float kernels"
    return {"notes": () if model.is_float else (pairs,)}


def _openvino(model: QuantizedGraph, folder: Path, _strict: bool) -> dict[str, Any]:
    return {"notes": export_folder(model, folder)}


def _onnx(model: QuantizedGraph, file: Path, strict: bool) -> dict[str, Any]:
    return export_onnx(model, file, for_onnxruntime=False, strict=strict)


def _onnxruntime(model: QuantizedGraph, file: Path, strict: bool) -> dict[str, Any]:
    return export_onnx(model, file, for_onnxruntime=True, strict=strict)


def _aot(model: QuantizedGraph, file: Path, strict: bool) -> dict[str, Any]:
    return export_aot(model, file, strict=strict)


_WRITERS: dict[str, Callable[[QuantizedGraph, Path, bool], dict[str, Any]]] = {
    "pt2": _pt2, "aot": _aot, "onnx": _onnx, "onnxruntime": _onnxruntime, "openvino": _openvino,
}  # fmt: skip
