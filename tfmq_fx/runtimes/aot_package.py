"""Compile a quantized graph to a package with AOTInductor: Inductor's C++ and oneDNN's int8 kernels.

AOTInductor by itself computes every layer of a quantized graph in float32, and does not say so. The patterns
that turn quantize/dequantize pairs around a convolution or linear into oneDNN's kernels are torchao's. They
match only constant weights (`freezing`) and constant scales. Four things make them match:
    `rescale_temporal`    constant activation scales
    `signed_weights`      weights as signed bytes, zero point 0
    `flatten_linears`     linears over rows; with any batch size, the patterns for other ranks do not match
    freezing              in its own process: importing torchao's patterns changes Inductor for all of it

The kernels that really run are counted in the package's C++. On a CPU without int8 instructions (VNNI, AMX),
oneDNN's kernels saturate for 8-bit weights. A package compiled there computes those layers in float, on the
same integers, and the export's notes report it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from tfmq_fx.artefact.program import dynamic_shapes, exported, graph_of, save_program
from tfmq_fx.artefact.quantized_graph import QuantizedGraph, example_inputs
from tfmq_fx.base.arithmetic import NO_INT8, ByteSums
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files
from tfmq_fx.base.tracing import tracing
from tfmq_fx.passes.int8.flatten_linears import flatten_linears
from tfmq_fx.passes.int8.fold_weights import fold_weights
from tfmq_fx.passes.int8.signed_weights import signed_weights
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.runtimes.cpu import byte_sums
from tfmq_fx.runtimes.exported import fallen_back
from tfmq_fx.runtimes.layers import (
    float8_because,
    float8_layers,
    path_of,
    quantized_layers,
    saturating_layers,
)
from tfmq_fx.runtimes.torch_engine import OPTIONS

log = logging.getLogger(__name__)
COMPILERS = ("g++", "clang++", "c++")
# The functions that Inductor's C++ calls for a convolution or linear: oneDNN's int8 kernels, and all others.
_INT8 = re.compile(r"aoti_torch_cpu__q(?:conv|linear)\w*pointwise\w*\(")
_FLOAT = re.compile(
    r"aoti_torch_cpu_+(?:mkldnn_)*(?:convolution|convolution_pointwise|linear_pointwise|addmm_out|mm_out)\w*\("
)


def require_compiler() -> None:
    """Raise a TFMQError that says what AOTInductor needs, if there is no C++ compiler."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        found = f"CXX={named} was not found" if named else f"none of {', '.join(COMPILERS)} is in PATH"
        raise TFMQError(
            f'export: format "aot" needs a C++ compiler, but {found}; install one, or export as .pt2, .onnx or a folder.'
        )


def export_aot(model: QuantizedGraph, file: Path, *, strict: bool) -> dict[str, Any]:
    """Compile the network for this machine's CPU and write the package.

    Returns the fields of `Exported` that are known here: weights, kernels and notes. Raises TFMQError if
    there is no C++ compiler, if the network is not on the CPU, if Inductor cannot compile the graph, and, if
    `strict`, when a quantized layer gets no int8 kernel.
    """
    require_compiler()
    if model.device.type != "cpu":
        raise TFMQError(
            f'export: format "aot" is for the CPU, but the network is on {model.device}; quantize it on the CPU, or load it from disk.'
        )
    gm = graph_of(exported(model))
    PassManager([*TO_INT8, signed_weights, flatten_linears])(gm)
    bytes_, floats, saturating = len(quantized_layers(gm)), float8_layers(gm), saturating_layers(gm)
    wanted = bytes_ + len(floats)
    because, elsewhere, stored = float8_because(floats), "", bytes_
    known = [path_of(layer) for layer in floats]
    fold_weights(gm, floats)
    if saturating and byte_sums() is not ByteSums.EXACT:
        known += [path_of(layer) for layer in saturating]
        fold_weights(gm, saturating)
        stored -= len(saturating)
        because += f"; {len(saturating)} would saturate: {NO_INT8}"
    elif saturating:
        elsewhere = f"{len(saturating)} of {wanted} quantized layers saturate on a CPU without VNNI or AMX; to run there, compile on such a CPU"
    inputs = example_inputs(model, batch=2)
    with tracing(), torch.no_grad():
        program = torch.export.export(gm, (), inputs, dynamic_shapes=dynamic_shapes(model), strict=False)
    found: dict[str, Any] = {"weights": {"int8": stored}}

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="tfmq-aot-") as folder:
            save_program(program, Path(folder) / "graph.pt2")
            _compile(Path(folder) / "graph.pt2", path)
        found["kernels"] = kernels(path)
        fallen = fallen_back(found["kernels"], wanted, strict=strict, because=because, layers=known)
        found["notes"] = (*fallen, *([elsewhere] if elsewhere else []))

    replace_files(file, write)
    return found


def _compile(graph: Path, package: Path) -> None:
    """Compile in a separate process. Raises TFMQError with the last line of its stderr when it fails."""
    command = [sys.executable, "-W", "ignore", "-m", "tfmq_fx.runtimes.aot_package", str(graph), str(package)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not package.is_file():
        lines = [line for line in result.stderr.strip().splitlines() if line.strip()] or ["no message"]
        raise TFMQError(
            f"export: AOTInductor cannot compile the graph ({lines[-1].strip()}); export it as .pt2, .onnx or a folder."
        )


def compile_package(graph: str, package: str) -> None:
    """Compile an exported graph to a package, in the process that `_compile` starts.

    Importing torchao's patterns changes Inductor for the whole process.
    """
    import torch._inductor

    from tfmq_fx.base._torchao import register_x86_patterns

    register_x86_patterns()
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            torch.export.load(graph), package_path=package, inductor_configs=OPTIONS
        )


def kernels(package: Path) -> dict[str, int]:
    """Return how many convolutions and linears the package's C++ computes in int8, and how many in float."""
    with zipfile.ZipFile(package) as archive:
        sources = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".wrapper.cpp")]
    return {
        name: sum(len(pattern.findall(s)) for s in sources)
        for name, pattern in (("int8", _INT8), ("float", _FLOAT))
    }


if __name__ == "__main__":
    compile_package(*sys.argv[1:])
