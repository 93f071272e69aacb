"""A quantized graph as a package of compiled code, by AOTInductor: C++ of Inductor, int8 kernels of oneDNN.

AOTInductor by itself computes every layer of a quantized graph in float32, and does not say so: the patterns that turn
quantize/dequantize pairs around a convolution or linear into oneDNN's kernels are torchao's, fire only where weights are
constants (`freezing`), and want constant scales. Four things bring them about:
    `rescale_temporal`    constant activation scales
    `signed_weights`      weights as signed bytes, zero point 0
    `flatten_linears`     linears over rows; with a batch of any size the patterns for other ranks do not match
    freezing              in a process of its own: importing torchao's patterns changes Inductor for the whole process
What really runs is counted in the C++ of the package. On a CPU without int8 instructions (VNNI, AMX) oneDNN's kernels
saturate for weights of 8 bits: compiled there, those layers stay in float, on the same integers, and that is said.
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

from tfmq_fx.artefact.drop_in import QuantizedGraph
from tfmq_fx.artefact.program import dynamic_shapes, example_inputs, exported, graph_of, save_program
from tfmq_fx.base.arithmetic import NO_INT8, ByteSums
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files
from tfmq_fx.passes.int8.flatten_linears import flatten_linears
from tfmq_fx.passes.int8.fold_weights import fold_weights
from tfmq_fx.passes.int8.signed_weights import signed_weights
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.runtimes.cpu import byte_sums
from tfmq_fx.runtimes.exported import fallen_back
from tfmq_fx.runtimes.layers import quantized_layers, saturating_layers
from tfmq_fx.runtimes.torch_engine import OPTIONS

log = logging.getLogger(__name__)
COMPILERS = ("g++", "clang++", "c++")
# What Inductor's C++ calls for a convolution or linear: oneDNN on bytes, and everything else.
_INT8 = re.compile(r"aoti_torch_cpu__q(?:conv|linear)\w*pointwise\w*\(")
_FLOAT = re.compile(
    r"aoti_torch_cpu_+(?:mkldnn_)*(?:convolution|convolution_pointwise|linear_pointwise|addmm_out|mm_out)\w*\("
)


def require_compiler() -> None:
    """Raise a TFMQError that says what AOTInductor needs when there is no C++ compiler."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        found = f"CXX={named} is not there" if named else f"none of {', '.join(COMPILERS)} is in PATH"
        raise TFMQError(
            f'export: format "aot" needs a C++ compiler, and {found}; install one, or export as .pt2, .onnx or a folder.'
        )


def export_aot(model: QuantizedGraph, file: Path, *, strict: bool) -> dict[str, Any]:
    """Compile for this machine's CPU and write the package; what `Exported` wants to know.

    Raises TFMQError without a C++ compiler, where Inductor cannot compile the graph, and under `strict` when a
    quantized layer does not get an int8 kernel.
    """
    require_compiler()
    if model.device.type != "cpu":
        raise TFMQError(
            f'export: format "aot" is for the CPU, and the network is on {model.device}; quantize it on the CPU, or load it.'
        )
    gm = graph_of(exported(model))
    PassManager([*TO_INT8, signed_weights, flatten_linears])(gm)
    wanted, saturating = len(quantized_layers(gm)), saturating_layers(gm)
    because, elsewhere, stored = "", "", wanted
    if saturating and byte_sums() is not ByteSums.EXACT:
        fold_weights(gm, saturating)
        stored -= len(saturating)
        because = f"; {len(saturating)} would saturate: {NO_INT8}"
    elif saturating:
        elsewhere = f"{len(saturating)} of {wanted} quantized layers saturate on a CPU without VNNI or AMX: compile there for it"
    inputs = example_inputs(model, batch=2)
    with torch.no_grad():
        program = torch.export.export(gm, (), inputs, dynamic_shapes=dynamic_shapes(model), strict=False)
    found: dict[str, Any] = {"weights": {"int8": stored}}

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="tfmq-aot-") as folder:
            save_program(program, Path(folder) / "graph.pt2")
            _compile(Path(folder) / "graph.pt2", path)
        found["kernels"] = kernels(path)
        fallen = fallen_back(found["kernels"], wanted, strict=strict, because=because)
        found["notes"] = (*fallen, *([elsewhere] if elsewhere else []))

    replace_files(file, write)
    return found


def _compile(graph: Path, package: Path) -> None:
    """In a process of its own, whose last words are the error's."""
    command = [sys.executable, "-W", "ignore", "-m", "tfmq_fx.runtimes.aot_package", str(graph), str(package)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not package.is_file():
        lines = [line for line in result.stderr.strip().splitlines() if line.strip()] or ["no words"]
        raise TFMQError(
            f"export: AOTInductor cannot compile the graph ({lines[-1].strip()}); export it as .pt2, .onnx or a folder."
        )


def compile_package(graph: str, package: str) -> None:
    """What the process of `_compile` does. It changes Inductor for itself."""
    import torch._inductor

    from tfmq_fx.base._torchao import register_x86_patterns

    register_x86_patterns()
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            torch.export.load(graph), package_path=package, inductor_configs=OPTIONS
        )


def kernels(package: Path) -> dict[str, int]:
    """How many convolutions and linears the package's C++ computes in bytes, and how many in float."""
    with zipfile.ZipFile(package) as archive:
        sources = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".wrapper.cpp")]
    return {
        name: sum(len(pattern.findall(s)) for s in sources)
        for name, pattern in (("int8", _INT8), ("float", _FLOAT))
    }


if __name__ == "__main__":
    compile_package(*sys.argv[1:])
