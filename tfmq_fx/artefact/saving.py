"""Write and read the artefact: JSON and safetensors, written whole or not at all, and checked when read.

    config.json                                 the network's config + quantization_config
    diffusion_pytorch_model.safetensors         see below
    graph.json                                  the quantized graph, so that the network's code is not needed
    report.json                                 what was quantized and how
    temporal_block.safetensors, .json           the float temporal block, where it is kept outside the network

Tensors carry the network's state-dict names. A quantized weight W is stored as three tensors: W_q (integers),
W_scale and W_zero_point, per output channel, with W = (q - zero_point) * scale. With groups, W_q has the
shape (R, group size): the rows are the groups of the first output channel, then of the next, with each weight
flattened to (C_out, C_in * kernel), and scale and zero point are per row.

`quantization_config.tensors` gives every tensor's shape and dtype. A tensor that has `bits` (integers and
zero points) is packed as a little-endian stream of that many bits per value, offset by its quant_min.

Activations of the temporal block have `<node>_by_timestep.scale` and `.zero_point` of T rows each, for T
timesteps or products of timesteps with other finite inputs. Cached temporal features lie side by side in the
T rows of `temporal_cache.<key>.values`. If they are int8, they are multiplied by `.scale`, which has one
column per feature.

`quantization_config.sha256` holds the digests of the other files except the report. Its entry `config.json`
is the digest of the config itself: of its JSON with sorted keys and without that entry. To edit a file by
hand, remove its digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_fx.artefact.graph_json import (
    graph_from_json,
    graph_to_json,
    is_tensor_name,
    packed_tensors,
    tensors_of,
)
from tfmq_fx.artefact.interface import Interface
from tfmq_fx.artefact.outside import Outside
from tfmq_fx.artefact.quantized_graph import QuantizedGraph
from tfmq_fx.base.arithmetic import IntegerRange, dtype_name, pack_bits, unpack_bits
from tfmq_fx.base.errors import TFMQError, first_line, require_type
from tfmq_fx.base.files import finite_json, replace_folder, require_writable, sha256_of
from tfmq_fx.base.mapped import on_disk, outgrows
from tfmq_fx.graph.inputs import placeholders

M = TypeVar("M", bound=QuantizedGraph)
_NEEDED = ("recipe", "timesteps", "timesteps_dtype", "finite", "interface", "tensors", "sha256")
QUANT_METHOD = "tfmq"


FORMAT_VERSION = 4


CONFIG, WEIGHTS, GRAPH, REPORT = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "graph.json",
    "report.json",
)
BLOCK_WEIGHTS, BLOCK_GRAPH = "temporal_block.safetensors", "temporal_block.json"
# Bytes. Larger packed tensors wait in mapped files until all of them are written: safetensors takes all at once. Smaller float
# tensors are copied when they are read.
MAPPED = 2**20
MAX_MEMORY = 8.0  # GiB of unpacked integers that a loaded network holds in memory


def save(model: QuantizedGraph, folder: Path) -> None:
    """Write the artefact to `folder`: a new or empty folder, or an artefact, which is replaced as a whole.

    Raises TFMQError when the folder holds anything else or cannot be written. Then nothing is left behind.
    """
    check_output_folder(folder)
    replace_folder(folder, lambda temporary: _write(model, temporary))


def check_output_folder(folder: Path) -> None:
    """Raise TFMQError when `folder` cannot be written, or exists and is neither empty nor a tfmq artefact."""
    require_writable(folder)
    for _ in range(5):
        if not folder.exists() or is_artefact(folder):
            return
        with suppress(OSError):
            if not any(folder.iterdir()):
                return
        time.sleep(0.02)  # another process may be replacing it at this moment
    raise TFMQError(
        f"{folder}: exists and is not a tfmq artefact; choose another output folder or remove it yourself."
    )


def is_artefact(folder: Path) -> bool:
    """Return True for a folder whose config.json is that of a tfmq artefact."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(model: QuantizedGraph, folder: Path) -> None:
    packed = packed_tensors(model.network)
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, dict[str, Any]] = {}
    for name, value in sorted(tensors_of(model.network).items()):
        if not is_tensor_name(name):
            raise TFMQError(f"tensor {name!r}: a name with quotes or control characters cannot be saved.")
        manifest[name] = {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}
        tensors[name] = _stored(value)
        if name in packed:
            low, high = packed[name]
            span = _integers(low, high, value.dtype)
            manifest[name] |= {"bits": span.bits, "quant_min": low, "quant_max": high}
            tensors[name] = pack_bits(value, span)
            if tensors[name].numel() > MAPPED:
                tensors[name] = on_disk(tensors[name], folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _dump(folder / GRAPH, graph_to_json(model.network))
    _dump(folder / REPORT, finite_json(model.report))
    outside = None if model.outside is None else _write_outside(model.outside, folder)
    files = (WEIGHTS, GRAPH) if outside is None else (WEIGHTS, GRAPH, BLOCK_WEIGHTS, BLOCK_GRAPH)
    quantization = {
        "quant_method": QUANT_METHOD,
        "kind": model.kind,
        "format_version": FORMAT_VERSION,
        "recipe": model.recipe,
        "timesteps": model.timesteps.tolist(),
        "timesteps_dtype": dtype_name(model.timesteps.dtype),
        "finite": {n: {"values": v.tolist(), "dtype": dtype_name(v.dtype)} for n, v in model.finite.items()},
        "interface": dataclasses.asdict(model.interface),
        "tensors": manifest,
        "outside": outside,
        "sha256": {name: sha256_of(folder / name) for name in files},
    }
    # The digest is of the config as it will be read: all keys of JSON are strings.
    config = json.loads(json.dumps({**model.parts()["config"], "quantization_config": quantization}))
    config["quantization_config"]["sha256"][CONFIG] = _config_digest(config)
    _dump(folder / CONFIG, config)


def _stored(value: Tensor) -> Tensor:
    """Return a tensor as safetensors takes it, which knows no complex128: its real and imaginary parts, (..., 2)."""
    value = value.contiguous().cpu()
    return torch.view_as_real(value) if value.dtype == torch.complex128 else value


def _write_outside(outside: Outside, folder: Path) -> dict[str, Any]:
    """Write the temporal block that is outside the network, and return what else is needed to read it."""
    tensors = tensors_of(outside.block)
    save_file({n: _stored(x) for n, x in tensors.items()}, folder / BLOCK_WEIGHTS, metadata={"format": "pt"})
    _dump(folder / BLOCK_GRAPH, graph_to_json(outside.block))
    manifest = {n: {"shape": list(x.shape), "dtype": dtype_name(x.dtype)} for n, x in tensors.items()}
    return {**outside.settings(), "tensors": manifest}


def _read_outside(
    folder: Path, written: Mapping[str, Any] | None, *, timestep: str, tables: Mapping[str, Tensor]
) -> Outside | None:
    """Return the temporal block that is outside the network, if there is one."""
    if written is None:
        return None
    with _reading(folder / BLOCK_WEIGHTS):
        tensors = _read_tensors(folder / BLOCK_WEIGHTS, written["tensors"], math.inf)  # none are integers
    with _reading(folder / BLOCK_GRAPH):
        block = graph_from_json(_read_json(folder / BLOCK_GRAPH), tensors)
    settings = {n: x for n, x in written.items() if n != "tensors"}
    with _reading(folder / CONFIG):
        return Outside(block, timestep=timestep, tables=tables, mapped=True, **settings)


def read(folder: str | Path, models: Mapping[str, type[M]], *, max_memory: float = MAX_MEMORY) -> M:
    """Read an artefact and return it as an instance of the class for its kind; see `tfmq_fx.load`."""
    require_type(folder, (str, Path), "folder", "name the folder of an artefact")
    if not (isinstance(max_memory, Real) and max_memory >= 0):
        raise TFMQError(f"max_memory: {max_memory!r} is not a number of GiB; use zero or more.")
    folder = Path(folder)
    if not os.path.isdir(folder):  # Path.is_dir raises for names that are too long
        raise TFMQError(f"{folder}: no such folder.")
    if (folder / "model_index.json").is_file():
        parts = [str(f) for f in sorted(folder.iterdir()) if is_artefact(f)]
        raise TFMQError(f"{folder}: is a pipeline's folder; its artefacts are {', '.join(parts) or 'none'}.")
    before = _identity(folder)
    config = _read_json(folder / CONFIG)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise TFMQError(
            f"{folder / CONFIG}: not a tfmq artefact (no quantization_config with quant_method {QUANT_METHOD!r})."
        )
    if quantization.get("format_version") != FORMAT_VERSION:
        raise TFMQError(
            f"{folder / CONFIG}: format version {quantization.get('format_version')!r}, but this library reads {FORMAT_VERSION}; "
            "quantize again, or install the version that wrote it."
        )
    if absent := [name for name in _NEEDED if name not in quantization]:
        raise TFMQError(
            f"{folder / CONFIG}: quantization_config has no {absent[0]!r}; save the artefact again."
        )
    with _reading(folder / CONFIG):
        _check_digests(folder, config)
    with _reading(folder / WEIGHTS):
        tensors = _read_tensors(folder / WEIGHTS, quantization["tensors"], max_memory * 2**30)
    with _reading(folder / GRAPH):
        graph = graph_from_json(_read_json(folder / GRAPH), tensors)
    report = _read_json(folder / REPORT)
    with _reading(folder / CONFIG):
        face = quantization["interface"]
        tuples = {n: tuple(face.get(n, ())) for n in ("required", "conditions", "others", "nonzero", "idle")}
        interface = Interface(**{**face, **tuples})
        for spec in interface.inputs.values():
            _dtype(spec["dtype"])
        timesteps = torch.tensor(quantization["timesteps"], dtype=_dtype(quantization["timesteps_dtype"]))
        if not timesteps.numel():
            raise TFMQError(f"{folder / CONFIG}: 'timesteps' is empty; save the artefact again.")
        finite = {
            n: torch.tensor(v["values"], dtype=_dtype(v["dtype"])) for n, v in quantization["finite"].items()
        }
        model = models[quantization.get("kind", "quantized")]
    outside = _read_outside(
        folder, quantization.get("outside"), timestep=interface.timestep,
        tables={interface.timestep: timesteps, **finite},
    )  # fmt: skip
    if _identity(folder) != before:
        raise TFMQError(f"{folder}: was replaced while it was read; load it again.")
    taken = [*interface.inputs, *(() if outside is None else outside.taken)]
    if taken != list(placeholders(graph)):
        raise TFMQError(
            f"{folder / GRAPH}: takes {', '.join(placeholders(graph))}, but {CONFIG} says {', '.join(taken)}."
        )
    with _reading(folder / CONFIG):
        return model(
            graph,
            interface=interface,
            timesteps=timesteps,
            finite=finite,
            config={n: v for n, v in config.items() if n != "quantization_config"},
            recipe=quantization["recipe"],
            report=report,
            outside=outside,
        )


def _identity(folder: Path) -> tuple[int, ...]:
    """Return values that change when another folder replaces this one under the same name."""
    try:
        found = folder.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Convert any error that json, torch, numpy or torch.fx raise for a malformed file to a TFMQError.

    The message names the file.
    """
    try:
        yield
    except TFMQError as error:
        if file.name in str(error) or str(file.parent) in str(error):
            raise
        raise TFMQError(f"{file}: {first_line(error)}") from error
    except Exception as error:
        raise TFMQError(f"{file}: not valid ({type(error).__name__}: {first_line(error)}).") from error


def _check_digests(folder: Path, config: Mapping[str, Any]) -> None:
    digests = config["quantization_config"]["sha256"]
    for name, digest in digests.items():
        if name not in (WEIGHTS, GRAPH, CONFIG, BLOCK_WEIGHTS, BLOCK_GRAPH):
            raise TFMQError(f"{folder / CONFIG}: lists the unknown file {name[:80]!r}.")
        if not (folder / name).is_file():
            raise TFMQError(f"{folder / name}: missing.")
        if (_config_digest(config) if name == CONFIG else sha256_of(folder / name)) != digest:
            raise TFMQError(
                f"{folder / name}: corrupt or truncated; its content does not match the hash in {CONFIG}."
            )


def _read_tensors(file: Path, manifest: dict[str, dict[str, Any]], limit: float) -> dict[str, Tensor]:
    """Return the tensors of a file by name. They are mapped from it; unpacked integers from temporary files, if these
    integers take more bytes than `limit`.
    """
    if not file.is_file():
        raise TFMQError(f"{file}: missing.")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise TFMQError(f"{file}: corrupt or truncated ({first_line(error)}).") from error
    if stored.keys() != manifest.keys():
        wrong = sorted(stored.keys() ^ manifest.keys())[0]
        raise TFMQError(f"{file}: tensor {wrong[:80]!r} is not both in the file and in {CONFIG}.")
    tensors = {}
    size = sum(8 * stored[n].numel() // spec["bits"] for n, spec in manifest.items() if spec.get("bits"))
    mapped = outgrows(size, limit, f"{file}: the unpacked integers need", "raise max_memory")
    for name, spec in manifest.items():
        if not is_tensor_name(name):
            raise TFMQError(f"{file}: {name[:80]!r} is not a valid tensor name.")
        value, shape, dtype = stored[name], tuple(spec["shape"]), _dtype(spec["dtype"])
        if "bits" in spec:
            span = _checked_integers(file, name, spec, dtype)
            if len(shape) > 64 or math.prod(shape) * span.bits > 8 * value.numel():  # before allocating
                raise TFMQError(f"{file}: tensor {name!r} has too few bytes for the shape in {CONFIG}.")
            value = unpack_bits(value, shape, span)
            value = on_disk(value) if mapped and value.numel() > MAPPED else value
        if dtype == torch.complex128 and value.dtype == torch.float64 and value.shape[-1:] == (2,):
            value = torch.view_as_complex(value)
        if value.data_ptr() % 64 and value.is_floating_point() and value.nbytes <= MAPPED:
            value = (
                value.clone()
            )  # torch's products of one row round in another way where memory is not aligned
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise TFMQError(
                f"{file}: tensor {name!r} is {value.dtype} {tuple(value.shape)}, but {CONFIG} says {dtype} {shape}."
            )
        tensors[name] = value
    return tensors


def _checked_integers(file: Path, name: str, spec: Mapping[str, Any], dtype: torch.dtype) -> IntegerRange:
    low, high, shape = spec["quant_min"], spec["quant_max"], spec["shape"]
    integers = torch.iinfo(dtype)  # raises TypeError for other dtypes
    valid = all(type(x) is int for x in (low, high, *shape)) and min(shape, default=0) >= 0
    fits = valid and max(-128, integers.min) <= low < high <= min(255, integers.max)
    if not fits or spec["bits"] != (span := _integers(low, high, dtype)).bits:
        raise TFMQError(
            f"{file}: tensor {name!r}: {CONFIG} gives {spec['bits']!r} bits for the range {low!r} to {high!r}, or an invalid shape."
        )
    return span


def _integers(low: int, high: int, dtype: torch.dtype) -> IntegerRange:
    return IntegerRange(quant_min=low, quant_max=high, symmetric=low < 0, dtype=dtype)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TFMQError(f"{CONFIG}: {name!r} is not a valid dtype.")
    return dtype


def _dump(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _config_digest(config: Mapping[str, Any]) -> str:
    """Return the digest of the config as JSON, without its own digest."""
    quantization = config["quantization_config"]
    others = {name: digest for name, digest in quantization["sha256"].items() if name != CONFIG}
    whole = {**config, "quantization_config": {**quantization, "sha256": others}}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise TFMQError(f"{file}: missing.")
    try:
        value = json.loads(file.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise TFMQError(f"{file}: not readable as JSON ({first_line(error)}).") from error
    if not isinstance(value, dict):
        raise TFMQError(f"{file}: not a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")
