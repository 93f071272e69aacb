"""Compile a quantized graph with OpenVINO, and report which kernels it chose."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.drop_in import QuantizedGraph
from tfmq_fx.artefact.program import example_inputs
from tfmq_fx.base.arithmetic import SATURATES, ByteSums
from tfmq_fx.base.files import replace_folder
from tfmq_fx.runtimes.engine import (
    PRECISIONS,
    Compilation,
    Lowered,
    cache_key,
    choose_precision,
    kernels_to_json,
    remembered,
)
from tfmq_fx.runtimes.layers import EngineLayer, Kernel
from tfmq_fx.runtimes.openvino_file import FLOAT, MODEL, WEIGHTS, read_layers, require_openvino, write


def lower_openvino(model: QuantizedGraph, wanted: Compilation) -> Lowered:
    """Convert and compile with OpenVINO, or take both from the cache."""
    openvino = require_openvino()
    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = choose_precision(wanted.precision, has_bfloat16="BF16" in can)
    pairs = wanted.sums is ByteSums.PAIRS

    def convert(new: Path) -> None:
        write(model, new, float_share=float(pairs))

    start = time.perf_counter()
    folder = wanted.root / cache_key(model, f"{openvino.__version__}{' pairs' * pairs}")
    cached = folder.is_dir()
    if not cached:
        replace_folder(folder, convert)
    converted = time.perf_counter() - start
    layers = read_layers(folder)
    all_float = pairs and all(layer.saturates or layer.float_because for layer in layers)
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Otherwise OpenVINO would round activations that the recipe leaves in float, before weights that it
        # unpacks.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        **(FLOAT if all_float or wanted.sums is ByteSums.NONE else {}),
    }
    # OpenVINO's own cache distinguishes compiled networks by some of these settings, but not by all.
    conditions = json.dumps([settings, sorted(can), openvino.__version__])
    kept = folder / hashlib.sha256(conditions.encode()).hexdigest()[:16]
    if wanted.keep:
        kept.mkdir(exist_ok=True)
        settings["CACHE_DIR"] = str(kept)
    compiled = Compiled(folder, model=model, settings=settings)
    compiled(*example_inputs(model, batch=wanted.batch).values())
    first = time.perf_counter() - start - converted
    details = {
        "library": f"openvino {openvino.__version__}",
        "precision": precision,
        "cached": cached,
        "compiled": True,
        "weight_bytes": (folder / WEIGHTS).stat().st_size,
        "seconds": {"convert": round(converted, 2), "first": round(first, 2)},
    }
    kernels = kernels_of_executions(layers, compiled)
    if wanted.keep:
        found = remembered(kept / "kernels.json", lambda: kernels_to_json(kernels))
        kernels = [Kernel(**k) for k in found]
    return Lowered(network=compiled, kernels=kernels, details=details)


def kernels_of_executions(layers: Iterable[EngineLayer], compiled: Compiled) -> list[Kernel]:
    """Return the kernel of each layer, from OpenVINO's execution graph."""
    found: dict[str, list[Execution]] = {}
    for execution in compiled.executions():
        for name in execution.layers:
            found.setdefault(name, []).append(execution)
    return [_kernel(layer, found.get(layer.node, []) + found.get(layer.weight, [])) for layer in layers]


def _kernel(layer: EngineLayer, executions: list[Execution]) -> Kernel:
    """Return the kernel of a layer.

    executions: the executed nodes that bear its name. There may be several, for its multiplication, bias and
        scales.
    """
    products = [e for e in executions if e.kind in PRODUCTS] or executions[:1]
    kernel, precision = (products[0].kernel, products[0].precision) if products else ("", "")
    int8 = is_int8(kernel)
    reason = ""
    if not products:
        reason = "not among the nodes that OpenVINO executes: folded, or fused under another name"
    elif not int8:
        reason = layer.float_because or (SATURATES if layer.saturates else "OpenVINO chose a float kernel")
    return layer.ran_as(kernel, precision=precision, int8=int8, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A node of OpenVINO's execution graph."""

    kind: str  # "Convolution", "FullyConnected", "Eltwise", ...
    kernel: str  # "brgconv_avx512_I8"
    precision: str  # "u8", "bf16", "f32"
    layers: tuple[str, ...]  # the nodes of our graph that it computes, and those whose constants it reads


PRODUCTS = (
    "Convolution",
    "Deconvolution",
    "FullyConnected",
    "MatMul",
    "ScaledDotProductAttention",
    "Subgraph",
)


def is_int8(kernel: str) -> bool:
    """Return True for an int8 kernel, by OpenVINO's name for it.

    "_I8" reads unsigned bytes. "_i8" reads signed bytes, which OpenVINO chooses if the zero point is in the
    middle of the range. `Execution.precision` cannot tell: it may be that of weights that a float kernel
    unpacks.
    """
    return kernel.lower().endswith("_i8")


class Compiled(nn.Module):
    """The graph on OpenVINO's kernels. It takes the inputs in order and nests the outputs as the graph does.

    For a known batch size, OpenVINO lays out memory in advance, which is 1.6 to 1.9 times as fast as a batch
    of any size (digits, one thread). So there is one compiled network for each shape of inputs, and the last
    `KEPT` are kept. They share the file.
    """

    KEPT = 4

    def __init__(self, folder: Path, *, model: QuantizedGraph, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder, self.settings = folder, dict(settings)
        self.core = require_openvino().Core()
        file = self.core.read_model(folder / MODEL)
        names = list(model.interface.inputs)
        self.order = [names.index(i.get_node().get_friendly_name()) for i in file.inputs]
        outputs = iter(range(len(file.outputs)))
        self.nested = torch.fx.map_arg(model.network.graph.output_node().args[0], lambda _: next(outputs))
        self.compiled: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        self.seconds: dict[int, float] = {}  # batch size -> seconds that compiling for it took

    def forward(self, *inputs: Tensor) -> Any:
        given = [inputs[i].detach().contiguous() for i in self.order]
        result = self.compile(given)([x.numpy() for x in given], share_inputs=True)
        return pytree.tree_map(lambda i: torch.from_numpy(result[i]), self.nested)

    def compile(self, inputs: Sequence[Tensor]) -> Any:  # type: ignore[override]
        """Return OpenVINO's network for inputs of these shapes. The inputs are in OpenVINO's order."""
        shapes = tuple(tuple(x.shape) for x in inputs)
        if shapes in self.compiled:
            self.compiled.move_to_end(shapes)
        else:
            start = time.perf_counter()
            network = self.core.read_model(self.folder / MODEL)
            network.reshape(dict(zip(network.inputs, map(list, shapes), strict=True)))
            self.compiled[shapes] = self.core.compile_model(network, "CPU", self.settings)
            self.seconds[max(s[0] for s in shapes if s)] = time.perf_counter() - start
            if len(self.compiled) > self.KEPT:
                self.compiled.popitem(last=False)
        return self.compiled[shapes]

    def executions(self) -> Iterator[Execution]:
        """Yield the executed nodes of the network that was called last."""
        compiled = next(reversed(self.compiled.values()))
        for node in compiled.get_runtime_model().get_ordered_ops():
            names = [*_info(node, "originalLayersNames").split(","), *_constants(node)]
            yield Execution(
                kind=_info(node, "layerType"),
                kernel=_info(node, "primitiveType"),
                precision=_info(node, "runtimePrecision"),
                layers=tuple(name.partition("/")[0] for name in names),
            )


def _info(node: Any, key: str) -> str:
    value: str = node.get_rt_info()[key].astype(str)
    return value


def _constants(node: Any) -> Iterator[str]:
    """Yield the names of the constants that an executed node reads, directly or after a change of layout."""
    for value in node.input_values():
        source = value.get_node()
        while _info(source, "layerType") in ("Reorder", "Reshape", "Transpose", "Convert"):
            source = source.input_value(0).get_node()
        if _info(source, "layerType") == "Const":
            yield source.get_friendly_name()
