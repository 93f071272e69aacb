"""Run a quantized graph on oneDNN's int8 kernels with torch alone, compiled by Inductor or node by node.

Compiled, there is one shared library for each shape of inputs (torch.export with fixed sizes, then
AOTInductor with frozen weights). Its C++ calls the kernels and looks up the scales of a timestep. Nothing is
traced, guarded or compiled again from step to step. A library in a cache folder needs no compiler any more.
Without a C++ compiler, the graph runs node by node, with the same kernels, on weights laid out once.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.package.package import load_package
from torch.fx import GraphModule, Interpreter, Node

from tfmq_fx.artefact.program import flat_graph
from tfmq_fx.artefact.quantized_graph import QuantizedGraph, example_inputs
from tfmq_fx.base.arithmetic import NO_INT8, ByteSums
from tfmq_fx.base.errors import TFMQError, first_line
from tfmq_fx.base.files import keep_folder
from tfmq_fx.base.tracing import tracing
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.written import keeps_buffers, kept, written_buffers
from tfmq_fx.passes.int8.bfloat16_glue import bfloat16_glue
from tfmq_fx.passes.int8.fold_weights import fold, fold_weights, keep_what_is_read
from tfmq_fx.passes.int8.kernels import FALLBACK, FLOAT8_KERNEL, GPU_KERNELS, KERNELS, LAYER
from tfmq_fx.passes.int8.onednn_kernels import LAY_OUT, onednn_kernels
from tfmq_fx.passes.int8.share_quantized import QUANTIZE, share_quantized
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.runtimes.cpu import torch_has_bfloat16
from tfmq_fx.runtimes.engine import (
    PRECISIONS,
    Compilation,
    Lowered,
    Nesting,
    PerShape,
    cache_key,
    choose_precision,
    folder_for,
    kernels_to_json,
    shapes_of,
)
from tfmq_fx.runtimes.layers import EngineLayer, Kernel, layers_of


def lower_torch(model: QuantizedGraph, wanted: Compilation) -> Lowered:
    """Put oneDNN's kernels into the graph, and compile it if that is wanted and possible."""
    has = dict(torch.cpu.get_capabilities())
    precision = choose_precision(wanted.precision, has_bfloat16=torch_has_bfloat16())
    start = time.perf_counter()
    settings = [precision, wanted.pack, wanted.sums.value, torch.get_num_threads(), has, OPTIONS]
    folder = wanted.root / cache_key(model, json.dumps(settings, default=str))
    prepare = functools.cache(
        lambda: prepare_graph(model, precision=precision, pack=wanted.pack, sums=wanted.sums)
    )

    def write(new: Path) -> None:
        known = {"kernels": kernels_to_json(prepare().kernels), "weight_bytes": weight_bytes(prepare().gm)}
        (new / KNOWN).write_text(json.dumps(known))

    # A library no longer knows what it was compiled from.
    cached = keep_folder(folder / "prepared", write)
    known = json.loads((folder / "prepared" / KNOWN).read_text())
    inputs = list(example_inputs(model, batch=wanted.batch).values())
    network, why_not = compiled_or_not(
        lambda: prepare().gm, inputs, model=model, folder=folder, compile=wanted.compile
    )
    first = time.perf_counter() - start
    details = {
        "library": f"torch {torch.__version__}",
        "precision": precision,
        "cached": cached,
        "compiled": not why_not,
        "weight_bytes": known["weight_bytes"],
        **({"not_compiled_because": why_not} if why_not else {}),
        "seconds": {"first": round(first, 2)},
    }
    return Lowered(network=network, kernels=[Kernel(**k) for k in known["kernels"]], details=details)


log = logging.getLogger(__name__)

KNOWN, LIBRARY = "prepared.json", "network.pt2"


PACKED = (torch.ops.tfmq.int4_conv.default, torch.ops.tfmq.int4_linear.default)


# Inductor's options for this compilation alone. Frozen weights are constants, laid out now, not at each call.
OPTIONS = {"freezing": True, "aot_inductor.precompile_headers": False}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The graph with int8 kernels, and the kernel of each layer."""

    gm: GraphModule
    kernels: list[Kernel]


def prepare_graph(
    model: QuantizedGraph, *, precision: str, pack: str | None, sums: ByteSums = ByteSums.EXACT
) -> Prepared:
    """Return the flat graph of torch's operators and int8 kernels.

    precision: of everything that is not int8, "bfloat16" or "float32". pack: "int4" or None; see `lower`.
    sums: how the CPU sums products of bytes. If its sums can saturate, layers whose weights make them
        saturate stay in float, on the same integers. If it cannot multiply bytes, all layers do.

    Raises TFMQError naming a node that cannot run.
    """
    gm = flat_graph(model)
    PassManager(TO_INT8)(gm)
    layers = list(layers_of(gm))
    if sums is not ByteSums.NONE:
        PassManager([functools.partial(onednn_kernels, pack=pack, sums=sums), share_quantized])(gm)
    fold_weights(gm)
    inputs = example_inputs(model, batch=1)
    dtypes = dtypes_of(gm, inputs)
    if precision == "bfloat16":
        bfloat16_glue(gm, dtypes=dtypes, precise=set(placeholders(model.temporal_block)))
        dtypes_of(gm, inputs)  # to name an operator that lacks bfloat16
    kernels = kernels_of_graph(gm, layers, PRECISIONS[precision], sums)
    keep_what_is_read(gm)
    return Prepared(gm=gm, kernels=kernels)


class _Dtypes(Interpreter):
    """An interpreter that runs the graph once, keeps every tensor's dtype, and names the node that fails."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # or torch would append its own text to our message
        self.found: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:  # operators may raise any type
            raise TFMQError(f"node {n.name}: {n.target} cannot run here ({first_line(error)}).") from error
        if isinstance(value, Tensor):
            self.found[n] = value.dtype
        return value


@keeps_buffers
def dtypes_of(gm: GraphModule, inputs: Mapping[str, Tensor]) -> dict[Node, torch.dtype]:
    """Run the graph and return the dtype of each tensor's node. Raises TFMQError naming a node that fails."""
    run = _Dtypes(gm)
    with torch.no_grad():
        run.run(*inputs.values())
    return run.found


def kernels_of_graph(
    gm: GraphModule, layers: Sequence[EngineLayer], glue: str, sums: ByteSums
) -> list[Kernel]:
    """Return the kernel that runs each layer.

    gm: the graph with the kernels. layers: those of the graph before the kernels were put in. glue: the
    precision of the layers that are not int8, by its short name.
    """
    replaced = {name: n for n in gm.graph.nodes for name in n.meta.get(LAYER, ())}
    left = {n.name: n.meta.get(FALLBACK, "") for n in gm.graph.nodes}
    found = []
    for layer in layers:
        if (node := replaced.get(layer.node)) is not None:
            found.append(_replaced(layer, node.target))
            continue
        reason = layer.float_because or left.get(layer.node, "")
        if not reason and layer.node in left:
            reason = (
                NO_INT8
                if sums is ByteSums.NONE
                else "its operands are quantized, but torch has no int8 kernel for it"
            )
        found.append(
            layer.ran_as(f"aten.{layer.op}", precision=glue, int8=False, reason=reason or "not in the graph")
        )
    return found


def _replaced(layer: EngineLayer, kernel: Any) -> Kernel:
    if kernel is FLOAT8_KERNEL:
        words = "it multiplies float8_e4m3fn"
        return layer.ran_as(f"{kernel}", precision="f8e4m3fn", int8=False, float8=True, reason=words)
    bytes_ = "i8" if kernel in GPU_KERNELS else "u8"
    return layer.ran_as(f"{kernel}", precision=bytes_, int8=True, reason="")


def lay_out(gm: GraphModule) -> GraphModule:
    """Prepare the graph to run node by node: lay out weights for the kernels, and quantize in place."""
    for i, node in enumerate(list(gm.graph.nodes)):
        if node.target in LAY_OUT:
            fold(gm, node, f"laid_out_{i}")
        elif node.target is QUANTIZE:
            node.target = quantize
    gm.graph.eliminate_dead_code()
    keep_what_is_read(gm)
    gm.recompile()
    return gm


def quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Quantize with the rounding of torch's operator, in one new tensor instead of five."""
    y = x.float() * (1.0 / scale)
    return y.round_().add_(zero_point).clamp_(low, high).to(dtype)


def compiler_missing() -> str:
    """Return why Inductor finds no C++ compiler; "" if it finds one."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # Inductor's own type, or any error of starting a program
        return f"no C++ compiler ({first_line(error)})"
    return ""


class TorchEager(nn.Module):
    """The graph on oneDNN's kernels, run node by node. It takes any batch size and needs no compiler."""

    def __init__(self, gm: GraphModule, *, nesting: Nesting) -> None:
        super().__init__()
        self.gm, self.nesting = lay_out(gm), nesting
        self.seconds: dict[int, float] = {}

    def forward(self, *inputs: Tensor) -> Any:
        with torch.no_grad():
            return self.nesting.of(self.gm(*[x.detach() for x in inputs]))


class TorchCompiled(nn.Module):
    """The graph on oneDNN's kernels, compiled to one shared library for each shape of inputs.

    The last four libraries stay loaded. If `folder` already holds a library, it is used as it is, and `make`,
    which prepares the graph, is not called.
    """

    def __init__(self, make: Callable[[], GraphModule], *, folder: Path, nesting: Nesting) -> None:
        super().__init__()
        self.graph, self.folder, self.nesting = make, folder, nesting
        self.networks = PerShape(self.make)

    @property
    def seconds(self) -> dict[int, float]:
        """Return, by batch size, the seconds that compiling or loading for it took."""
        return self.networks.seconds

    def forward(self, *inputs: Tensor) -> Any:
        given = [x.detach().contiguous() for x in inputs]
        with torch.no_grad():
            return self.nesting.of(self.networks.of(given)(*given))

    def make(self, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the library for inputs of these shapes, from the folder if it is there.

        Several threads may run in it at once: it has a runner for each, and all share the weights.
        """

        def write(new: Path) -> None:
            try:
                compile_to(new / LIBRARY, self.graph(), inputs)
            except TFMQError:
                raise
            except Exception as error:  # Inductor and the compiler raise many types
                shapes = ", ".join(map(str, shapes_of(inputs)))
                raise TFMQError(
                    f"compiling for inputs of {shapes}: {type(error).__name__}: {first_line(error)}"
                ) from error

        folder = self.folder / folder_for(inputs)
        keep_folder(folder, write)
        return load_package(str(folder / LIBRARY), num_runners=os.cpu_count() or 1)


def compiled_or_not(
    make: Callable[[], GraphModule],
    inputs: Sequence[Tensor],
    *,
    model: QuantizedGraph,
    folder: Path,
    compile: bool | None,
) -> tuple[nn.Module, str]:
    """Return the network, called once on these inputs, and why it is not compiled ("" if it is).

    make: prepares the graph. compile: as in `lower`. Raises TFMQError for compile=True if it cannot be
        compiled.
    """
    nesting = Nesting(model.network)
    why_not = "compile=False" if compile is False else ""
    if not why_not:
        network = TorchCompiled(make, folder=folder, nesting=nesting)
        try:
            network(*inputs)
        except TFMQError as error:
            why_not = str(error)
            if compile:
                raise TFMQError(
                    f"compile=True: {why_not}; use compile=False, which runs the same kernels node by node."
                ) from error
            log.warning("lower: not compiled, runs node by node: %s", why_not)
        else:
            return network, ""
    eager = TorchEager(make(), nesting=nesting)
    with kept(written_buffers(eager.gm)):  # the example is no call of the user's
        eager(*inputs)
    return eager, why_not


@tracing()  # TORCHINDUCTOR_CACHE_DIR too is the whole process's
def compile_to(file: Path, gm: GraphModule, inputs: Sequence[Tensor]) -> None:
    """Write the graph's library for inputs of these shapes.

    Inductor's own files, including the weights, go to a temporary folder.
    """
    missing = compiler_missing()
    if missing:
        raise TFMQError(missing)
    with tempfile.TemporaryDirectory(prefix="tfmq-inductor-") as folder:
        package = Path(folder) / "compiled.pt2"
        # Without gradients, Inductor may treat weights as constants. It fills the metadata dict in place.
        with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}), torch.no_grad():
            program = torch.export.export(gm, tuple(inputs), strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs={**OPTIONS, "aot_inductor.metadata": {}}
            )
        check_calls(package, gm)
        shutil.copyfile(package, file)


def check_calls(package: Path, gm: GraphModule) -> None:
    """Raise TFMQError unless the C++ that Inductor wrote calls every int8 kernel of the graph."""
    expected = sum(n.target in KERNELS and n.target not in PACKED for n in gm.graph.nodes)
    with zipfile.ZipFile(package) as archive:
        sources = [archive.read(n).decode() for n in archive.namelist() if n.endswith(".wrapper.cpp")]
    calls = sum(len(re.findall(r"\baoti_torch_cpu_*q(?:conv|linear)\w*\(", source)) for source in sources)
    if calls < expected:
        raise TFMQError(f"Inductor calls {calls} int8 kernels where the graph has {expected}")


def weight_bytes(gm: GraphModule) -> int:
    """Return the bytes that a graph's constants hold in memory. Shared memory counts once."""
    found: dict[int, int] = {}
    for value in [*gm.parameters(), *gm.buffers()]:
        if value.is_mkldnn:
            found[id(value)] = torch.ops.mkldnn._nbytes(value)
        else:
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())
