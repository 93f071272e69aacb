"""Compile a quantized graph with OpenVINO, and report which kernels it chose."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.artefact.quantized_graph import QuantizedGraph, example_inputs
from tfmq_fx.base.arithmetic import SATURATES, ByteSums
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import keep_folder
from tfmq_fx.runtimes.engine import (
    PRECISIONS,
    Compilation,
    Lowered,
    Nesting,
    PerShape,
    cache_key,
    choose_precision,
    folder_for,
    shapes_of,
)
from tfmq_fx.runtimes.layers import FLOAT8_IN_FLOAT, EngineLayer, Kernel
from tfmq_fx.runtimes.openvino_file import (
    APART,
    FLOAT,
    MODEL,
    NOT_LOWERED,
    WEIGHTS,
    read_layers,
    require_openvino,
    write,
)

log = logging.getLogger(__name__)


def lower_openvino(model: QuantizedGraph, wanted: Compilation) -> Lowered:
    """Convert and compile with OpenVINO, or take both from the cache."""
    openvino = require_openvino()
    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = choose_precision(wanted.precision, has_bfloat16="BF16" in can)
    pairs = wanted.sums is ByteSums.PAIRS

    def convert(new: Path) -> None:
        write(model, new, float_share=float(pairs))

    start = time.perf_counter()
    home = wanted.root / cache_key(model, f"{openvino.__version__}{' pairs' * pairs}")
    folder = home / "converted"
    cached = keep_folder(folder, convert)
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
    conditions = json.dumps([settings, sorted(can), openvino.__version__])
    kept = home / hashlib.sha256(conditions.encode()).hexdigest()[:16] if wanted.keep else None
    compiled = Compiled(folder, model=model, settings=settings, kept=kept)
    compiled(*example_inputs(model, batch=wanted.batch).values())
    first = time.perf_counter() - start - converted
    why_apart = compiled.networks.latest().not_merged_because
    details = {
        "library": f"openvino {openvino.__version__}",
        "precision": precision,
        "cached": cached,
        "compiled": True,
        **({"not_merged_because": why_apart} if why_apart else {}),
        "weight_bytes": (folder / WEIGHTS).stat().st_size,
        "seconds": {"convert": round(converted, 2), "first": round(first, 2)},
    }
    kernels = kernels_of_executions(layers, compiled.executions())
    return Lowered(network=compiled, kernels=kernels, details=details)


def kernels_of_executions(layers: Iterable[EngineLayer], executions: Iterable[Execution]) -> list[Kernel]:
    """Return the kernel of each layer, from the nodes that OpenVINO executes."""
    found: dict[str, list[Execution]] = {}
    for execution in executions:
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
        chose = FLOAT8_IN_FLOAT if layer.float8 else "OpenVINO chose a float kernel"
        reason = layer.float_because or (SATURATES if layer.saturates else chose)
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
    four are kept. They share the file's weights.

    folder: the files of `openvino_file.write`. kept: the cache for compiled networks, or None. We export them
    to it ourselves: OpenVINO's own cache does not notice damage, distinguishes compiled networks by not all
    settings, and lets other processes see half-written files.
    """

    def __init__(
        self, folder: Path, *, model: QuantizedGraph, settings: Mapping[str, Any], kept: Path | None = None
    ) -> None:
        super().__init__()
        self.folder, self.settings, self.kept = folder, dict(settings), kept
        self.core = require_openvino().Core()
        self.file = self.core.read_model(folder / MODEL)
        names = list(model.interface.inputs)
        self.order = [names.index(i.get_node().get_friendly_name()) for i in self.file.inputs]
        self.nesting = Nesting(model.network)
        self.networks = PerShape(self.make)

    @property
    def seconds(self) -> dict[int, float]:
        """Return, by batch size, the seconds that compiling or loading for it took."""
        return self.networks.seconds

    def forward(self, *inputs: Tensor) -> Any:
        given = [inputs[i].detach().contiguous() for i in self.order]
        if any(0 in x.shape for x in given):  # OpenVINO would divide by it, which ends the process
            given = [x.new_zeros([max(size, 1) for size in x.shape]) for x in given]
            return self.nesting.of([y[:0] for y in self.networks.of(given)(given)])
        return self.nesting.of(self.networks.of(given)(given))

    def make(self, inputs: Sequence[Tensor]) -> ForShapes:
        """Return the network for inputs of these shapes, in OpenVINO's order, from the cache if it is there."""
        if self.kept is None:
            return self.compiled_for(inputs)
        made: list[ForShapes] = []

        def write(new: Path) -> None:
            made.append(self.compiled_for(inputs))
            (new / BLOB).write_bytes(made[0].compiled.export_model().getbuffer())
            executions = [dataclasses.asdict(e) for e in made[0].executions]
            known = {"executions": executions, "not_merged_because": made[0].not_merged_because}
            (new / KERNELS).write_text(json.dumps(known))

        folder = self.kept / folder_for(inputs)
        keep_folder(folder, write)
        return made[0] if made else self.loaded(folder)

    def compiled_for(self, inputs: Sequence[Tensor]) -> ForShapes:
        """Compile for inputs of these shapes."""
        why_apart = ""
        try:
            compiled = self._compiled(inputs, self.settings)
        except RuntimeError as error:  # what it could convert, but not run
            words = str(error).strip().splitlines()[-1]
            try:
                compiled = self._compiled(inputs, {**self.settings, **APART})
            except RuntimeError:
                raise TFMQError(f"OpenVINO cannot compile the graph: {words}; {NOT_LOWERED}") from error
            why_apart = words
            log.warning("lower: OpenVINO computes each operator by itself, which is slower: %s", words)
        return ForShapes(compiled, list(executions_of(compiled)), not_merged_because=why_apart)

    def _compiled(self, inputs: Sequence[Tensor], settings: Mapping[str, Any]) -> Any:
        network = self.file.clone()
        network.reshape(dict(zip(network.inputs, map(list, shapes_of(inputs)), strict=True)))
        return self.core.compile_model(network, "CPU", dict(settings))

    def loaded(self, folder: Path) -> ForShapes:
        """Return the network that `make` wrote into a folder. Its execution graph no longer has all names."""
        compiled = self.core.import_model((folder / BLOB).read_bytes(), "CPU", self.settings)
        known = json.loads((folder / KERNELS).read_text())
        executions = [Execution(**{**e, "layers": tuple(e["layers"])}) for e in known["executions"]]
        return ForShapes(compiled, executions, not_merged_because=known["not_merged_because"])

    def executions(self) -> list[Execution]:
        """Return the executed nodes of the network that was called last."""
        return self.networks.latest().executions


BLOB, KERNELS = "network.blob", "kernels.json"


class ForShapes:
    """OpenVINO's network for inputs of fixed shapes. Threads may call it at once.

    A request holds one call's inputs and outputs. There are as many as calls ran at once.

    not_merged_because: why OpenVINO computes chains of operators one by one; "" if it merges them.
    """

    def __init__(self, compiled: Any, executions: list[Execution], *, not_merged_because: str) -> None:
        self.compiled, self.executions = compiled, executions
        self.not_merged_because = not_merged_because
        self.idle: deque[Any] = deque()  # its append and pop are atomic

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs, in memory of their own."""
        try:
            request = self.idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        result = request.infer([x.numpy() for x in inputs], share_inputs=True, share_outputs=False)
        outputs = [torch.from_numpy(result[i]) for i in range(len(result))]
        self.idle.append(request)
        return outputs


def executions_of(compiled: Any) -> Iterator[Execution]:
    """Yield the executed nodes of a network that OpenVINO has just compiled."""
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
