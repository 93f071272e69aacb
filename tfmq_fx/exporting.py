"""One door for every file format that a quantized network can be written to."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tfmq_fx.arithmetic import PAIRS_FIT, centred, saturates
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import aten, attribute, matmul_inputs, op_name, weight_argument
from tfmq_fx.model import QuantizedModel
from tfmq_fx.passes.rescale_temporal import DEQUANTIZED

log = logging.getLogger(__name__)
ops = torch.ops.quantized_decomposed

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
    kernels: Mapping[str, int] = field(
        default_factory=dict
    )  # "int8", "float" -> layers, where the file fixes it
    notes: tuple[str, ...] = ()  # what somebody who expects int8 everywhere should know


def export(
    model: QuantizedModel, file: str | Path, *, format: str | None = None, strict: bool = False
) -> Exported:
    """Write the quantized network for another runtime; the file is absent, as it was, or whole.

    format: "pt2" torch.export's; "aot" a package compiled by AOTInductor; "onnx" standard QDQ; "onnxruntime" QDQ in the
        form of which onnxruntime's CPU computes every quantized layer in bytes; "openvino" a folder. None: by the
        file's name, .pt2, .onnx ("onnxruntime") or a folder without suffix.
    strict: refuse when a quantized layer would not run on an int8 kernel; "aot", "onnx" and "onnxruntime" can tell.

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
    if strict and chosen in ("pt2", "openvino"):
        raise TFMQError(
            f"export: strict: which kernels run is not known of format {chosen!r} before it is loaded; "
            'q.lower("cpu", strict=True) tells for OpenVINO.'
        )
    there = next(p for p in file.absolute().parents if p.exists())
    if not there.is_dir():  # known before minutes of tracing
        raise TFMQError(f"{file}: cannot be written ({there} is not a folder).")
    start = time.perf_counter()
    found = _WRITERS[chosen](model, file, strict)
    exported = Exported(
        format=chosen,
        file=file,
        bytes=sum(f.stat().st_size for f in _files(file)),
        seconds=time.perf_counter() - start,
        **found,
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
    """The exported file, and the weights beside it; or what is in the folder."""
    beside = file.with_name(f"{file.name}.data")
    return list(file.iterdir()) if file.is_dir() else [file, *([beside] if beside.is_file() else [])]


def _pt2(model: QuantizedModel, file: Path, _strict: bool) -> dict[str, Any]:
    from tfmq_fx.saving import exported, save_program

    program = exported(model)
    replace_files(file, lambda path: save_program(program, path))
    return {"notes": ("torch.export.load gives quantize/dequantize pairs around float kernels",)}


def _openvino(model: QuantizedModel, folder: Path, _strict: bool) -> dict[str, Any]:
    from tfmq_fx.lowering_openvino import export_folder

    return {"notes": export_folder(model, folder)}


def _onnx(model: QuantizedModel, file: Path, strict: bool) -> dict[str, Any]:
    from tfmq_fx.export_onnx import export_onnx

    return export_onnx(model, file, for_onnxruntime=False, strict=strict)


def _onnxruntime(model: QuantizedModel, file: Path, strict: bool) -> dict[str, Any]:
    from tfmq_fx.export_onnx import export_onnx

    return export_onnx(model, file, for_onnxruntime=True, strict=strict)


def _aot(model: QuantizedModel, file: Path, strict: bool) -> dict[str, Any]:
    from tfmq_fx.export_aot import export_aot

    return export_aot(model, file, strict=strict)


_WRITERS: dict[str, Callable[[QuantizedModel, Path, bool], dict[str, Any]]] = {
    "pt2": _pt2, "aot": _aot, "onnx": _onnx, "onnxruntime": _onnxruntime, "openvino": _openvino,
}  # fmt: skip


def quantized_layers(gm: GraphModule) -> list[Node]:
    """The convolutions and linears of quantized weights and quantized inputs, after `rescale_temporal`."""
    pairs = (ops.dequantize_per_tensor.default, ops.dequantize_per_token.default)
    found = []
    for node in gm.graph.nodes:
        weight = _dequantized_weight(node)
        if weight is not None:
            x = node.args[0]
            found += [node] if x.target in pairs or x.meta.get(DEQUANTIZED) else []
    return found


def _dequantized_weight(layer: Any) -> Any:
    """The node that dequantizes the weight of a layer; None for another node, and for a float weight."""
    index = weight_argument(layer)
    if index is None:
        return None
    weight = layer.args[index]
    while op_name(weight) in ("view", "reshape"):  # groups
        weight = weight.args[0]
    return weight if weight.target is ops.dequantize_per_channel.default else None


def saturating_layers(gm: GraphModule) -> list[Node]:
    """The quantized layers that kernels of unsigned by signed bytes get wrong on x86 without VNNI: see `PAIRS_FIT`."""
    found = []
    for layer in quantized_layers(gm):
        weight = _dequantized_weight(layer)
        if weight not in layer.args:  # scales per group: in float everywhere
            continue
        q, zero_point = (attribute(gm, str(weight.args[i].target)) for i in (0, 2))
        if saturates(centred(q, zero_point, weight.args[3])):
            found.append(layer)
    return found


def saturating_products(gm: GraphModule) -> list[Node]:
    """The products of two quantized activations that int8 kernels get wrong there: see `PAIRS_FIT`."""
    found = []
    for node in gm.graph.nodes:
        operands: list[Any] = [
            x for x in matmul_inputs(node) if x.target is ops.dequantize_per_tensor.default
        ]
        if any(
            max(high - zero, zero - low) > PAIRS_FIT for zero, low, high in (x.args[2:5] for x in operands)
        ):
            found.append(node)
    return found


def multiply_in_float(gm: GraphModule, products: Iterable[Node]) -> None:
    """dequantize(quantize(x)) ==> clamp(round(x / s)) * s, of what these products read: the same numbers, and no int8 kernel."""
    for node in products:
        for x in matmul_inputs(node):
            if x.target is ops.dequantize_per_tensor.default:
                node.replace_input_with(x, _rounded(gm, x))
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _rounded(gm: GraphModule, pair: Any) -> Node:
    q, scale, zero_point, low, high, _ = pair.args
    y: Node = q.args[0]
    steps = (
        (aten.mul.Tensor, (1.0 / scale,)),
        (aten.round.default, ()),
        (aten.clamp.default, (low - zero_point, high - zero_point)),
        (aten.mul.Tensor, (scale,)),
    )
    with gm.graph.inserting_before(pair):
        for target, args in steps:
            y = gm.graph.call_function(target, (y, *args))
            y.meta = {k: v for k, v in pair.meta.items() if k == "val"}
    return y


def fallen_back(
    kernels: Mapping[str, int], wanted: int, *, strict: bool, because: str = ""
) -> tuple[str, ...]:
    """Words for the quantized layers that run in float. Raises TFMQError of them when `strict`."""
    fallen = wanted - kernels["int8"]
    if fallen <= 0:
        return ()
    words = f"{fallen} of {wanted} quantized layers run in float{because}"
    if strict:
        raise TFMQError(f"strict: {words}.")
    return (words,)


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
