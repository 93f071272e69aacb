"""The artefact on disk: JSON and safetensors, written whole or not at all, checked when read.

    config.json                                 the network's config + quantization_config
    diffusion_pytorch_model.safetensors         see below
    graph.json                                  the quantized graph, so that the network's code is not needed
    report.json                                 what was quantized how

Tensors carry the network's state-dict names. A quantized weight W is three of them: W_q (integers), W_scale and
W_zero_point, per output channel, with W = (q - zero_point) * scale. With groups W_q has the shape (R, group size): the
rows are the groups of the first output channel, then of the next, each weight flattened to (C_out, C_in * kernel), and
scale and zero point are per row. `quantization_config.tensors` gives every tensor's shape and dtype; one that has `bits`
(integers and zero points) is packed as a little-endian stream of that many bits each, offset by its quant_min.
Activations of the temporal block have `<node>_by_timestep.scale` and `.zero_point` of T rows each, T timesteps or
products of timesteps with other finite inputs. Cached temporal features lie side by side in the T rows of
`temporal_cache.<key>.values`; int8 ones times `.scale`, of a column per feature.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_fx.arithmetic import IntegerRange, pack_bits, unpack_bits
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph_json import graph_from_json, graph_to_json, packed_tensors, tensors_of
from tfmq_fx.model import Interface, QuantizedModel

QUANT_METHOD = "tfmq"
FORMAT_VERSION = 3
CONFIG, WEIGHTS, GRAPH, REPORT = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "graph.json",
    "report.json",
)


def save(model: QuantizedModel, folder: Path) -> None:
    """Write the artefact to `folder`: a new folder, or one of ours, which is replaced as a whole.

    Raises TFMQError when the folder holds anything else, or cannot be written; then nothing is left behind.
    """
    check_output_folder(folder)
    replace_folder(folder, lambda temporary: _write(model, temporary))


def check_output_folder(folder: Path) -> None:
    """Raise TFMQError when `folder` exists and is neither empty nor an artefact of ours."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or is_artefact(folder))):
        raise TFMQError(
            f"{folder}: exists and is not a tfmq artefact; choose another output folder or remove it yourself."
        )


def is_artefact(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text())
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then rename it: `folder` is absent, as it was, or whole."""
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    except OSError as error:
        raise TFMQError(f"{folder}: cannot be written ({error.strerror}).") from error
    try:
        write(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            old = temporary.with_name(temporary.name + "-old")
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
    except OSError as error:
        raise TFMQError(f"{folder}: cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(model: QuantizedModel, folder: Path) -> None:
    packed = packed_tensors(model.network)
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, dict[str, Any]] = {}
    for name, value in sorted(tensors_of(model.network).items()):
        manifest[name] = {"shape": list(value.shape), "dtype": _dtype_name(value.dtype)}
        tensors[name] = value.contiguous().cpu()
        if name in packed:
            low, high = packed[name]
            span = _integers(low, high, value.dtype)
            manifest[name] |= {"bits": span.bits, "quant_min": low, "quant_max": high}
            tensors[name] = pack_bits(value, span)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _dump(folder / GRAPH, graph_to_json(model.network))
    _dump(folder / REPORT, model.report)
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": model.recipe,
        "timesteps": model.timesteps.tolist(),
        "timesteps_dtype": _dtype_name(model.timesteps.dtype),
        "finite": {n: {"values": v.tolist(), "dtype": _dtype_name(v.dtype)} for n, v in model.finite.items()},
        "interface": dataclasses.asdict(model.interface),
        "tensors": manifest,
        "sha256": {name: _sha256(folder / name) for name in (WEIGHTS, GRAPH)},
    }
    _dump(folder / CONFIG, {**model._config, "quantization_config": quantization})


def load(folder: str | Path) -> QuantizedModel:
    """Read an artefact written by `save_pretrained`: the same integers, the same outputs, bit for bit.

    Nothing in the folder is executed; the network's own code is not needed. Raises TFMQError saying which
    file is missing, truncated, altered, of another version, or not ours.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TFMQError(f"{folder}: no such folder.")
    config = _read_json(folder / CONFIG)
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise TFMQError(
            f"{folder / CONFIG}: not a tfmq artefact (no quantization_config of quant_method {QUANT_METHOD!r})."
        )
    if quantization.get("format_version") != FORMAT_VERSION:
        raise TFMQError(
            f"{folder / CONFIG}: format version {quantization.get('format_version')!r}, this library reads {FORMAT_VERSION}; "
            "quantize again, or install the version that wrote it."
        )
    try:
        for name, digest in quantization["sha256"].items():
            if name not in (WEIGHTS, GRAPH):
                raise TFMQError(f"{folder / CONFIG}: lists the unknown file {name!r}.")
            if not (folder / name).is_file():
                raise TFMQError(f"{folder / name}: missing.")
            if _sha256(folder / name) != digest:
                raise TFMQError(
                    f"{folder / name}: corrupt or truncated; its content does not match the hash in {CONFIG}."
                )
        tensors = _read_tensors(folder / WEIGHTS, quantization["tensors"])
        graph = graph_from_json(_read_json(folder / GRAPH), tensors)
        face = quantization["interface"]
        return QuantizedModel(
            graph,
            interface=Interface(**{**face, "required": tuple(face["required"])}),
            timesteps=torch.tensor(quantization["timesteps"], dtype=_dtype(quantization["timesteps_dtype"])),
            finite={
                n: torch.tensor(v["values"], dtype=_dtype(v["dtype"]))
                for n, v in quantization["finite"].items()
            },
            config=config,
            recipe=quantization["recipe"],
            report=_read_json(folder / REPORT),
        )
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        RuntimeError,
        StopIteration,
    ) as error:
        raise TFMQError(f"{folder}: not a valid tfmq artefact ({type(error).__name__}: {error}).") from error


def _read_tensors(file: Path, manifest: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise TFMQError(f"{file}: corrupt or truncated ({error}).") from error
    if stored.keys() != manifest.keys():
        wrong = sorted(stored.keys() ^ manifest.keys())[0]
        raise TFMQError(f"{file}: tensor {wrong!r} is not both in the file and in {CONFIG}.")
    tensors = {}
    for name, spec in manifest.items():
        value, shape, dtype = stored[name], tuple(spec["shape"]), _dtype(spec["dtype"])
        if "bits" in spec:
            value = unpack_bits(value, shape, _integers(spec["quant_min"], spec["quant_max"], dtype))
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise TFMQError(
                f"{file}: tensor {name!r} is {value.dtype} {tuple(value.shape)}, {CONFIG} says {dtype} {shape}."
            )
        tensors[name] = value
    return tensors


def exported(model: QuantizedModel) -> torch.export.ExportedProgram:
    """The quantized graph, flat and functional, its inputs by name and any batch size."""
    inputs, dynamic = example_inputs(model, batch=2), dynamic_shapes(model)
    with torch.no_grad():
        return torch.export.export(model.network, (), inputs, dynamic_shapes=dynamic, strict=False)


def dynamic_shapes(model: QuantizedModel) -> dict[str, dict[int, Any]]:
    """The dimensions of the graph's inputs that may have any size, as torch.export wants to hear of them."""
    return {
        n: {i: torch.export.Dim.AUTO for i, s in enumerate(spec["shape"]) if s is None}
        for n, spec in model.interface.inputs.items()
    }


def example_inputs(model: QuantizedModel, *, batch: int) -> dict[str, Tensor]:
    """Zeros of the shapes and types that the graph takes."""
    return {
        name: torch.zeros(
            [batch if s is None else s for s in spec["shape"]],
            dtype=_dtype(spec["dtype"]),
            device=model.device,
        )
        for name, spec in model.interface.inputs.items()
    }


def export_pt2(model: QuantizedModel, file: Path) -> None:
    program = exported(model)
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}.pt2")
    try:
        torch.export.save(program, temporary)
        os.replace(temporary, file)
    except OSError as error:
        raise TFMQError(f"{file}: cannot be written ({error.strerror or error}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def _integers(low: int, high: int, dtype: torch.dtype) -> IntegerRange:
    return IntegerRange(quant_min=low, quant_max=high, symmetric=low < 0, dtype=dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TFMQError(f"{CONFIG}: {name!r} is no dtype.")
    return dtype


def _dump(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise TFMQError(f"{file}: missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TFMQError(f"{file}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise TFMQError(f"{file}: not a JSON object.")
    return value


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
