"""The quantized network on the CPU's int8 kernels, and a report of which layers really run on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tfmq_fx.errors import TFMQError, nearest_names
from tfmq_fx.graph_json import graph_to_json, tensors_of
from tfmq_fx.lowering_openvino import (
    PRODUCTS,
    Compiled,
    Execution,
    Layer,
    read_layers,
    require_openvino,
    write,
)
from tfmq_fx.model import DropIn, QuantizedModel
from tfmq_fx.saving import example_inputs, replace_folder

log = logging.getLogger(__name__)
LAYOUT = 1  # of what a cache folder holds: another number reads none of the old
PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}
# What multiplies bytes: VNNI in its two encodings, AMX, and Arm's dot products.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "dotprod", "i8mm")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What one convolution, linear or matmul runs as."""

    path: str  # its weight's name in the network's state dict; its node's name without one
    op: str
    kernel: str  # OpenVINO's name of it; "" where it is not found among the executed nodes
    precision: str  # of what it reads: "u8", "bf16", "f32"
    int8: bool
    reason: str  # why it is not int8; "" when it is
    fell_back: bool  # whether its inputs are quantized and it is not int8 all the same
    flops: int  # for one sample


class LoweredModel(DropIn):
    """The quantized network, compiled: same calls, outputs, `.config`, `.dtype`, `.device`.

    One compiled network serves all timesteps of a batch size: the scales are looked up inside. It cannot be saved;
    save the network it was made from. `report["lowering"]` says what every layer runs as, and
    `["compiled_seconds"]` in it, by batch size, what was compiled since.
    """

    network: Compiled

    def __init__(self, model: QuantizedModel, compiled: Compiled, *, lowering: dict[str, Any]) -> None:
        super().__init__(
            compiled,
            interface=model.interface,
            timesteps=model.timesteps,
            finite=model.finite,
            config=model._config,
            recipe=model.recipe,
            report={**model._report, "lowering": lowering},
        )

    @property
    def report(self) -> dict[str, Any]:
        report = super().report
        seconds = {str(size): round(value, 2) for size, value in self.network.seconds.items()}
        return {**report, "lowering": {**report["lowering"], "compiled_seconds": seconds}}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def lower(
    model: QuantizedModel,
    target: str = "cpu",
    *,
    precision: str | None = None,
    batch: int = 1,
    strict: bool = False,
    cache: str | Path | None = None,
) -> LoweredModel:
    """Compile for this machine's CPU with OpenVINO, for as many threads as torch has now.

    precision: of what is not int8, "bfloat16" or "float32"; None takes bfloat16 where the CPU computes in it. In
        float32 the outputs are the quantized network's but for rounding ties: an activation within float rounding of
        a tie may become the next integer. bfloat16 adds its own rounding, about 1% of the largest output.
    batch: the size of batch to compile for now. Any other is compiled for when it first comes, and the last four are
        kept; all steps of a schedule run on the same.
    strict: refuse a network of which a quantized layer does not get an int8 kernel.
    cache: a folder that keeps the converted and the compiled network: the next process starts in a fraction.

    Raises TFMQError for another target, without OpenVINO, and naming a node that it cannot express. A CPU without
    int8 instructions is warned of, and computes the same in float.
    """
    if target != "cpu":
        raise TFMQError(f'target={target!r}: unknown; there is "cpu".')
    if model.device.type != "cpu":
        raise TFMQError(
            f'target "cpu": the network is on {model.device}; quantize it on the CPU, or load it from disk.'
        )
    openvino = require_openvino()
    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = precision or ("bfloat16" if "BF16" in can else "float32")
    if precision not in PRECISIONS:
        raise TFMQError(f"precision={precision!r}: unknown; use {nearest_names(precision, PRECISIONS)}.")
    if PRECISIONS[precision] == "bf16" and "BF16" not in can:
        raise TFMQError(f"precision={precision!r}: this CPU does not compute in it; use 'float32', or None.")
    instructions = int8_instructions()
    if not instructions:
        words = "this CPU has no int8 instructions (VNNI, AMX): every layer runs in float, with the same integers."
        if strict:
            raise TFMQError(f'target "cpu": {words}')
        warnings.warn(words, stacklevel=2)
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # OpenVINO would round what the recipe leaves in float, in front of weights that it unpacks.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        # Without these instructions, byte products are summed in 16 bits, and saturate.
        **({} if instructions else {"LP_TRANSFORMS_MODE": "NO"}),
    }
    start = time.perf_counter()
    with ExitStack() as stack:
        root = cache or stack.enter_context(tempfile.TemporaryDirectory(prefix="tfmq-lowering-"))
        folder = Path(root) / _key(model)
        cached = folder.is_dir()
        if not cached:
            replace_folder(folder, lambda new: write(model, new))
        converted = time.perf_counter() - start
        # OpenVINO tells compiled networks apart by some of these settings, and not by all.
        conditions = json.dumps([settings, sorted(can), openvino.__version__])
        kept = folder / hashlib.sha256(conditions.encode()).hexdigest()[:16]
        if cache is not None:
            kept.mkdir(exist_ok=True)
            settings["CACHE_DIR"] = str(kept)
        compiled = Compiled(folder, model=model, settings=settings)
        compiled(*example_inputs(model, batch=batch).values())
        first = time.perf_counter() - start - converted
        layers = read_layers(folder)
        kernels = coverage(layers, compiled) if cache is None else _seen(kept, layers, compiled)
        # Without a cache, the files live as long as the network that compiles from them.
        weakref.finalize(compiled, stack.pop_all().close)
    total, int8 = (sum(k.flops for k in kernels if k.int8 or every) for every in (True, False))
    log.info("lower: %.1f%% of %.3g FLOPs in int8", 100 * int8 / max(total, 1), total)
    fallen = [k for k in kernels if k.fell_back]
    if strict and fallen:
        raise TFMQError(
            f"strict: {len(fallen)} of {len(kernels)} layers are quantized and run in float: "
            + "; ".join(f"{k.path}: {k.reason}" for k in fallen[:8])
            + ("; ..." if len(fallen) > 8 else ".")
        )
    lowering = {
        "target": target,
        "library": f"openvino {openvino.__version__}",
        "instructions": instructions,
        "precision": precision,
        "threads": settings["INFERENCE_NUM_THREADS"],
        "cached": cached,
        "seconds": {"convert": round(converted, 2), "first": round(first, 2)},
        "flops": {"total": total, "int8": int8},
        "kernels": [dataclasses.asdict(k) for k in kernels],
    }
    return LoweredModel(model, compiled, lowering=lowering)


def _seen(folder: Path, layers: list[Layer], compiled: Compiled) -> list[Kernel]:
    """`coverage`, kept in the folder: a compiled network from the cache has forgotten some names of what it fused."""
    file = folder / "kernels.json"
    if not file.is_file():
        temporary = file.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(json.dumps([dataclasses.asdict(k) for k in coverage(layers, compiled)]))
        os.replace(temporary, file)
    return [Kernel(**k) for k in json.loads(file.read_text())]


def int8_instructions() -> list[str]:
    """Those of INT8_INSTRUCTIONS that this CPU has."""
    has = torch.cpu.get_capabilities()
    return [name for name in INT8_INSTRUCTIONS if has.get(name)]


def coverage(layers: Iterable[Layer], compiled: Compiled) -> list[Kernel]:
    """What OpenVINO's execution graph says of each layer."""
    found: dict[str, list[Execution]] = {}
    for execution in compiled.executions():
        for name in execution.layers:
            found.setdefault(name, []).append(execution)
    return [_kernel(layer, found.get(layer.node, []) + found.get(layer.weight, [])) for layer in layers]


def _kernel(layer: Layer, executions: list[Execution]) -> Kernel:
    """Several executed nodes may bear a layer's name: what became of its multiplication, bias and scales."""
    products = [e for e in executions if e.kind in PRODUCTS] or executions[:1]
    kernel, precision = (products[0].kernel, products[0].precision) if products else ("", "")
    int8 = kernel.endswith("_I8")  # the precision may be that of weights which a float kernel unpacks
    reason = ""
    if not products:
        reason = "not among the nodes that OpenVINO executes: folded, or fused under another name"
    elif not int8:
        reason = layer.float_because or "OpenVINO chose a float kernel"
    return Kernel(
        path=layer.path or layer.node,
        op=layer.op,
        kernel=kernel,
        precision=precision,
        int8=int8,
        reason=reason,
        fell_back=not int8 and not layer.float_because,
        flops=layer.flops,
    )


def _key(model: QuantizedModel) -> str:
    """What the converted network depends on: the graph, its tensors, and the versions that convert it."""
    versions = [LAYOUT, torch.__version__, require_openvino().__version__, version("tfmq_fx")]
    digest = hashlib.sha256(
        json.dumps([graph_to_json(model.network), model.interface.inputs, versions]).encode()
    )
    for name, value in sorted(tensors_of(model.network).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
