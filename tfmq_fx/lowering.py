"""The quantized network on the CPU's int8 kernels, and a report of which layers really run on them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tfmq_fx.arithmetic import NO_INT8, SATURATES
from tfmq_fx.coverage import Kernel, Layer, layers_of
from tfmq_fx.errors import TFMQError, nearest_names
from tfmq_fx.exporting import saturating_layers
from tfmq_fx.graph_json import graph_to_json, tensors_of
from tfmq_fx.lowering_openvino import (
    FLOAT,
    PASSES,
    PRODUCTS,
    WEIGHTS,
    Compiled,
    Execution,
    is_int8,
    read_layers,
    require_openvino,
    write,
)
from tfmq_fx.lowering_torch import OPTIONS, compiled_or_not, flat_graph, prepare_graph, weight_bytes
from tfmq_fx.model import DropIn, QuantizedModel
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.resume import update_with_tensors
from tfmq_fx.saving import example_inputs, replace_folder

log = logging.getLogger(__name__)
LAYOUT = 2  # of what a cache folder holds: another number reads none of the old
ENGINES = ("openvino", "torch")
PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}
# OpenVINO's int8 kernel of linear layers on CPUs with AVX2 and without VNNI: a DiT-XL took as long as in float32.
SLOW_GEMM = "jit_gemm_I8"
MOST = 0.5  # of the multiplications
# What multiplies bytes: VNNI in its two encodings, AMX, and Arm's dot products.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "dotprod", "i8mm")


class Engine(Protocol):
    """A compiled network: the graph's inputs in order, its outputs nested as the graph nests them."""

    seconds: dict[int, float]  # what compiling or loading for a batch took, by its size


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What an engine made of a network."""

    network: nn.Module  # an Engine
    kernels: list[Kernel]
    details: dict[str, Any]  # the engine's own lines of the report, as plain JSON values


class LoweredModel(DropIn):
    """The quantized network, compiled: same calls, outputs, `.config`, `.dtype`, `.device`.

    One compiled network serves all timesteps of a batch size: the scales are looked up inside. It cannot be saved;
    save the network it was made from. `report["lowering"]` says what every layer runs as, and
    `["compiled_seconds"]` in it, by batch size, what was compiled since.
    """

    network: Any  # an Engine

    def __init__(self, model: QuantizedModel, compiled: nn.Module, *, lowering: dict[str, Any]) -> None:
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
    engine: str | None = None,
    precision: str | None = None,
    batch: int = 1,
    strict: bool = False,
    cache: str | Path | None = None,
    compile: bool | None = None,
    pack: str | None = None,
) -> LoweredModel:
    """Compile for this machine's CPU, for as many threads as torch has now.

    engine: "openvino" or "torch" (oneDNN's kernels through Inductor); None takes OpenVINO where it is installed: it was
        the faster of the two, and needs no C++ compiler. Of networks that are mostly linear layers, on CPUs with AVX2 and
        without VNNI, torch was, node by node, and is taken.
    precision: of what is not int8, "bfloat16" or "float32"; None takes bfloat16 where the CPU computes in it. In
        float32 the outputs are the quantized network's but for rounding ties: an activation within float rounding of
        a tie may become the next integer. bfloat16 adds its own rounding, about 1% of the largest output.
    batch: the size of batch to compile for now. Any other is compiled for when it first comes, and the last four are
        kept; all steps of a schedule run on the same.
    strict: refuse a network of which a quantized layer does not get an int8 kernel.
    cache: a folder that keeps the converted and the compiled network: the next process starts in a fraction.
    compile: for engine "torch": True needs a C++ compiler, False runs the int8 kernels node by node, None compiles
        where it can; `report["lowering"]["compiled"]` says which, and why not.
    pack: "int4", for engine "torch": weights of at most four bits stay two to a byte in memory, and are unpacked at
        each call.

    Raises TFMQError for another target, without the engine's package, and naming a node that it cannot express. A CPU
    without int8 instructions is warned of. With AVX2 alone it adds products of bytes in pairs of 16 bits, which is exact
    for weights within 64 steps of zero, as those of 4 bits are: layers beyond compute the same in float. Without AVX2 all do.
    """
    if target != "cpu":
        raise TFMQError(f'target={target!r}: unknown; there is "cpu".')
    if model.device.type != "cpu":
        raise TFMQError(
            f'target "cpu": the network is on {model.device}; quantize it on the CPU, or load it from disk.'
        )
    instructions = int8_instructions()
    pairs = not instructions and adds_pairs()
    engine, compile = _engine(engine, compile=compile, pack=pack, model=model, pairs=pairs)
    if precision not in (None, *PRECISIONS):
        raise TFMQError(f"precision={precision!r}: unknown; use {nearest_names(str(precision), PRECISIONS)}.")
    if not instructions:
        which = (
            "layers whose weights reach beyond 64 steps from zero, as 8 bits do, run"
            if pairs
            else "every layer runs"
        )
        words = f"{NO_INT8}: {which} in float, with the same integers."
        if strict and not pairs:
            raise TFMQError(f'target "cpu": {words}')
        warnings.warn(words, stacklevel=2)
    cpu = {"int8": bool(instructions) or pairs, "pairs": pairs}
    with ExitStack() as stack:
        # Without a cache, the files live as long as the network that compiles from them.
        root = Path(cache or stack.enter_context(tempfile.TemporaryDirectory(prefix="tfmq-lowering-")))
        if engine == "openvino":
            lowered = _with_openvino(
                model, root, precision=precision, batch=batch, keep=cache is not None, **cpu
            )
        else:
            lowered = _with_torch(
                model, root, precision=precision, batch=batch, compile=compile, pack=pack, **cpu
            )
        weakref.finalize(lowered.network, stack.pop_all().close)
    kernels = lowered.kernels
    total, int8 = sum(k.flops for k in kernels), sum(k.int8_flops for k in kernels)
    log.info("lower: %.1f%% of %.3g FLOPs in int8", 100 * int8 / max(total, 1), total)
    slow = sum(k.flops for k in kernels if k.kernel == SLOW_GEMM)
    if slow > MOST * total:
        log.warning(
            'lower: OpenVINO computes %.0f%% of this network by %s, no faster than float; engine="torch" has a faster one.',
            100 * slow / total,
            SLOW_GEMM,
        )
    fallen = [k for k in kernels if k.fell_back]
    if strict and fallen:
        raise TFMQError(
            f"strict: {len(fallen)} of {len(kernels)} layers are quantized and run in float: "
            + "; ".join(f"{k.path}: {k.reason}" for k in fallen[:8])
            + ("; ..." if len(fallen) > 8 else ".")
        )
    lowering = {
        "target": target,
        "engine": engine,
        "instructions": ["avx2"] if pairs else instructions,
        "threads": torch.get_num_threads(),
        "pack": pack,
        **lowered.details,
        "flops": {"total": total, "int8": int8},
        "kernels": _to_json(kernels),
    }
    return LoweredModel(model, lowered.network, lowering=lowering)


def _engine(
    engine: str | None, *, compile: bool | None, pack: str | None, model: QuantizedModel, pairs: bool
) -> tuple[str, bool | None]:
    """The engine to use, and whether it compiles. Raises TFMQError for an unknown one, and for what the one wanted cannot do."""
    if engine not in (None, *ENGINES):
        raise TFMQError(f"engine={engine!r}: unknown; use {nearest_names(str(engine), ENGINES)}, or None.")
    if pack not in (None, "int4"):
        raise TFMQError(f'pack={pack!r}: unknown; use "int4", or None.')
    if engine == "openvino":
        require_openvino()
        if pack is not None:
            raise TFMQError(
                f'pack={pack!r}: OpenVINO\'s int8 kernels hold weights as bytes; use engine="torch".'
            )
        if compile is not None:
            raise TFMQError(
                f'compile={compile}: OpenVINO always compiles, without a C++ compiler; use engine="torch".'
            )
    if engine is not None:
        return engine, compile
    if pack is not None or compile is not None:  # what OpenVINO has no form of
        return "torch", compile
    if find_spec("openvino") is None:
        log.warning(
            'lower: openvino is not installed, torch compiles instead; pip install "tfmq_fx[openvino]" for the faster engine.'
        )
        return "torch", compile
    if pairs and (share := _linear_share(model)) > MOST:
        log.info('lower: %.0f%% of it are linear layers, which engine="torch" runs faster here', 100 * share)
        return "torch", False  # to compile a DiT-XL takes more than 22 GB
    return "openvino", None


def _linear_share(model: QuantizedModel) -> float:
    """How much of a network are linear layers that run as `SLOW_GEMM`, where int8 kernels add pairs."""
    gm = flat_graph(model)
    PassManager(PASSES)(gm)
    saturating = {n.name for n in saturating_layers(gm)}
    layers = list(layers_of(gm))
    slow = (layer for layer in layers if layer.op == "linear" and layer.node not in saturating)
    int8 = sum(layer.flops for layer in slow if not layer.float_because)
    return int8 / max(sum(layer.flops for layer in layers), 1)


def _with_openvino(
    model: QuantizedModel,
    root: Path,
    *,
    precision: str | None,
    batch: int,
    keep: bool,
    int8: bool,
    pairs: bool,
) -> Lowered:
    openvino = require_openvino()
    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = _precision(precision, has_bfloat16="BF16" in can)
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # OpenVINO would round what the recipe leaves in float, in front of weights that it unpacks.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        **({} if int8 else FLOAT),
    }

    def convert(new: Path) -> None:
        write(model, new, float_share=float(pairs))

    start = time.perf_counter()
    folder = root / _key(model, f"{openvino.__version__}{' pairs' * pairs}")
    cached = folder.is_dir()
    if not cached:
        replace_folder(folder, convert)
    converted = time.perf_counter() - start
    layers = read_layers(folder)
    if pairs and all(layer.saturates or layer.float_because for layer in layers):
        settings |= FLOAT
    # OpenVINO tells compiled networks apart by some of these settings, and not by all.
    conditions = json.dumps([settings, sorted(can), openvino.__version__])
    kept = folder / hashlib.sha256(conditions.encode()).hexdigest()[:16]
    if keep:
        kept.mkdir(exist_ok=True)
        settings["CACHE_DIR"] = str(kept)
    compiled = Compiled(folder, model=model, settings=settings)
    compiled(*example_inputs(model, batch=batch).values())
    first = time.perf_counter() - start - converted
    details = {
        "library": f"openvino {openvino.__version__}",
        "precision": precision,
        "cached": cached,
        "compiled": True,
        "weight_bytes": (folder / WEIGHTS).stat().st_size,
        "seconds": {"convert": round(converted, 2), "first": round(first, 2)},
    }
    kernels = coverage(layers, compiled)
    if keep:
        found = _remembered(kept / "kernels.json", lambda: _to_json(kernels))
        kernels = [Kernel(**k) for k in found]
    return Lowered(network=compiled, kernels=kernels, details=details)


def _with_torch(
    model: QuantizedModel,
    root: Path,
    *,
    precision: str | None,
    batch: int,
    compile: bool | None,
    pack: str | None,
    int8: bool,
    pairs: bool,
) -> Lowered:
    has = dict(torch.cpu.get_capabilities())
    precision = _precision(precision, has_bfloat16=torch_has_bfloat16())
    start = time.perf_counter()
    conditions = json.dumps(
        [precision, pack, int8, pairs, torch.get_num_threads(), has, OPTIONS], default=str
    )
    folder = root / _key(model, conditions)
    cached = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    prepare = functools.cache(
        lambda: prepare_graph(model, precision=precision, pack=pack, int8=int8, pairs=pairs)
    )
    kernels = _remembered(folder / "kernels.json", lambda: _to_json(prepare().kernels))
    held = _remembered(folder / "weight_bytes.json", lambda: weight_bytes(prepare().gm))
    inputs = list(example_inputs(model, batch=batch).values())
    network, why_not = compiled_or_not(
        lambda: prepare().gm, inputs, model=model, folder=folder, compile=compile
    )
    first = time.perf_counter() - start
    details = {
        "library": f"torch {torch.__version__}",
        "precision": precision,
        "cached": cached,
        "compiled": not why_not,
        "weight_bytes": held,
        **({"not_compiled_because": why_not} if why_not else {}),
        "seconds": {"first": round(first, 2)},
    }
    return Lowered(network=network, kernels=[Kernel(**k) for k in kernels], details=details)


def _precision(precision: str | None, *, has_bfloat16: bool) -> str:
    if precision == "bfloat16" and not has_bfloat16:
        raise TFMQError(f"precision={precision!r}: this CPU does not compute in it; use 'float32', or None.")
    return precision or ("bfloat16" if has_bfloat16 else "float32")


def _remembered(file: Path, look: Callable[[], Any]) -> Any:
    """What `look` finds, as JSON in a file: a compiled network from the cache has forgotten some of it."""
    if not file.is_file():
        temporary = file.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(json.dumps(look()))
        os.replace(temporary, file)
    return json.loads(file.read_text())


def _to_json(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(k) for k in kernels]


def torch_has_bfloat16() -> bool:
    """Whether torch's kernels compute in bfloat16 on this CPU."""
    has = dict(torch.cpu.get_capabilities())
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def int8_instructions() -> list[str]:
    """Those of INT8_INSTRUCTIONS that this CPU has."""
    has = dict(torch.cpu.get_capabilities())
    return [name for name in INT8_INSTRUCTIONS if has.get(name)]


def adds_pairs() -> bool:
    """Whether this CPU can multiply bytes by AVX2: see `arithmetic.PAIRS_FIT`."""
    return bool(dict(torch.cpu.get_capabilities()).get("avx2"))


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
    int8 = is_int8(kernel)
    reason = ""
    if not products:
        reason = "not among the nodes that OpenVINO executes: folded, or fused under another name"
    elif not int8:
        reason = layer.float_because or (SATURATES if layer.saturates else "OpenVINO chose a float kernel")
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


def _key(model: QuantizedModel, engine: str) -> str:
    """What the converted network depends on: the graph, its tensors, and the versions that convert it."""
    versions = [LAYOUT, torch.__version__, engine, version("tfmq_fx")]
    digest = hashlib.sha256(
        json.dumps([graph_to_json(model.network), model.interface.inputs, versions]).encode()
    )
    update_with_tensors(digest, sorted(tensors_of(model.network).items()))
    return digest.hexdigest()[:32]
