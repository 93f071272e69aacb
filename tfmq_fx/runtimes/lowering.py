"""Lower a quantized network to the int8 kernels of a CPU or GPU, and report which layers really run on them."""

from __future__ import annotations

import logging
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.artefact.program import flat_graph
from tfmq_fx.artefact.quantized_graph import QuantizedGraph
from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.arithmetic import NO_INT8, ByteSums
from tfmq_fx.base.errors import TFMQError, nearest_names, require_type
from tfmq_fx.graph.written import frozen_buffers
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.runtimes import cuda
from tfmq_fx.runtimes.cpu import byte_sums, int8_instructions
from tfmq_fx.runtimes.cuda_engine import lower_cuda
from tfmq_fx.runtimes.engine import PRECISIONS, Compilation, kernels_to_json
from tfmq_fx.runtimes.layers import Kernel, layers_of, needs_sizes, saturating_layers
from tfmq_fx.runtimes.openvino_engine import lower_openvino
from tfmq_fx.runtimes.openvino_file import require_openvino
from tfmq_fx.runtimes.torch_engine import lower_torch

log = logging.getLogger(__name__)


ENGINES = {"openvino": lower_openvino, "torch": lower_torch, "cuda": lower_cuda}
TARGETS = {"cpu": ("openvino", "torch"), "cuda": ("cuda",)}  # target -> its engines


# OpenVINO's int8 kernel for linear layers on CPUs with AVX2 but without VNNI. With it, a DiT-XL took as long
# as in float32.
SLOW_GEMM = "jit_gemm_I8"


MOST = 0.5  # of the multiplications


class LoweredModel(DropIn):
    """A compiled quantized network with the same calls, outputs, `.config`, `.dtype` and `.device`.

    One compiled network serves all timesteps of a batch size: the scales are looked up inside. A lowered
    network cannot be saved; save the network it was made from. `report["lowering"]` says which kernel runs
    every layer. Its `compiled_seconds` gives, by batch size, the seconds of every compilation so far.

    taken: the dtypes in which the engine takes its inputs. An engine chooses its own precision inside.
    device: where it computes.
    """

    network: Any  # an Engine

    def __init__(
        self,
        model: QuantizedGraph,
        compiled: nn.Module,
        *,
        taken: Sequence[torch.dtype],
        lowering: dict[str, Any],
        device: torch.device,
    ) -> None:
        parts = model.parts()
        super().__init__(compiled, **{**parts, "report": {**parts["report"], "lowering": lowering}})
        self.taken, self.compiled_for = taken, device

    def _compute(self, inputs: list[torch.Tensor]) -> Any:
        for name, x in zip(self.interface.inputs, inputs, strict=True):
            if x.device != self.device:
                raise TFMQError(
                    f"forward: {name!r} is on {x.device}, and this network is compiled for {self.device}; move the tensor there."
                )
        outputs = super()._compute([x.to(dtype) for x, dtype in zip(inputs, self.taken, strict=True)])
        return pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(self.dtype) if x.is_floating_point() else x, outputs
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs. Raises TFMQError for an input that requires a gradient: there is none."""
        if torch.is_grad_enabled():
            given = {**{f"argument {i + 1}": value for i, value in enumerate(args)}, **kwargs}
            for name, (_, value) in leaves(given).items():
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    raise TFMQError(
                        f"forward: {name} requires a gradient, but a lowered network has none; call the network it was lowered "
                        "from, or, to compute outputs only, call this one under torch.no_grad()."
                    )
        return super().forward(*args, **kwargs)

    @property
    def report(self) -> dict[str, Any]:
        report = super().report
        seconds = {str(size): round(value, 2) for size, value in dict(self.network.seconds).items()}
        return {**report, "lowering": {**report["lowering"], "compiled_seconds": seconds}}

    @property
    def device(self) -> torch.device:
        return self.compiled_for

    def export(self, *_: Any, **__: Any) -> None:
        """Raise TFMQError: what is compiled cannot be written for another runtime."""
        raise TFMQError("export: this network is compiled; export the one that it was lowered from.")

    def __reduce__(self) -> Any:
        """Raise TFMQError: what is compiled can be neither copied nor pickled."""
        raise TFMQError(
            "a compiled network cannot be copied or pickled; copy or save the network that it was lowered from."
        )

    def lower(self, *_: Any, **__: Any) -> None:
        """Raise TFMQError: the network is lowered already."""
        raise TFMQError("lower: this network is lowered already; lower the one that it was lowered from.")


@neutral()
def lower(
    model: QuantizedGraph,
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
    """Compile the network for this machine's CPU, for as many threads as torch uses now, or for its GPU.

    target: "cpu" or "cuda", the current GPU. A network on the CPU is copied to the GPU; what is lowered takes and returns
        tensors there.
    engine: "openvino" or "torch" (oneDNN's kernels through Inductor). None takes OpenVINO if it is installed:
        it was the faster of the two, and it needs no C++ compiler. For networks that are mostly linear
        layers, on CPUs with AVX2 but without VNNI, None takes "torch", node by node, which was faster there.
        On a GPU there is one, "cuda" (Triton's kernels, Inductor, CUDA graphs).
    precision: of everything that is not int8, "bfloat16" or "float32". None takes bfloat16 if the CPU
        computes in it. In float32 the outputs are those of the quantized network except for rounding ties: an
        activation within float rounding of a tie may become the next integer. bfloat16 adds its own rounding,
        about 1% of the largest output.
    batch: the batch size to compile for now. Any other size is compiled when it is first used. The last four
        are kept. All steps of a schedule use the same one.
    strict: raise TFMQError when a quantized layer gets no int8 kernel, and when the network updates buffers that
        compiling would freeze. Without `strict`, `report["lowering"]["notes"]` says so.
    cache: a folder that keeps the converted and the compiled network. The next process then starts in a
        fraction of the time.
    compile: for engine "torch". True needs a C++ compiler, False runs the int8 kernels node by node, None
        compiles if possible. `report["lowering"]["compiled"]` says which it was, and
        `["not_compiled_because"]` why not. For engine "cuda" it needs no C++ compiler of its own, and True also
        measures how each int8 kernel is best cut into tiles.
    pack: "int4", for engines "torch" and "cuda": weights of at most four bits stay in memory two to a byte, and are
        unpacked at each call.

    Raises TFMQError for another target, for a missing GPU or engine, and for a node that the engine cannot express,
    naming it. Warns on a CPU without int8 instructions. With AVX2 alone, such a CPU adds products of bytes in
    pairs of 16 bits. That is exact for weights within 64 steps of zero, such as 4-bit weights; layers with
    larger weights compute the same in float. Without AVX2, all layers do.
    """
    if target not in TARGETS:
        raise TFMQError(f"target={target!r}: unknown; use {nearest_names(str(target), TARGETS)}.")
    if isinstance(batch, bool) or not isinstance(batch, Integral) or batch < 1:
        raise TFMQError(f"batch={batch!r}: is not a batch size; use a positive integer.")
    if compile is not None:
        require_type(compile, bool, "compile", "use True, False or None")
    if cache is not None:
        require_type(cache, (str, Path), "cache", "name a folder")
    gpu = cuda.require_gpu() if target == "cuda" else None
    if gpu is None and model.device.type != "cpu":
        raise TFMQError(
            f'target "cpu": the network is on {model.device}; quantize it on the CPU, or load it from disk.'
        )
    model, notes = model.closed(strict=strict)
    if needs_sizes(model):
        model, fixed = model.with_fixed_sizes()
        notes = (*notes, *fixed)
    sums = byte_sums() if gpu is None else ByteSums.EXACT
    in_float32 = model.in_float32()
    _require_engine(engine, target)
    _require_pack(pack)
    if gpu is None:
        engine, compile = _engine(engine, compile=compile, pack=pack, model=in_float32, sums=sums)
    else:
        engine = "cuda"
    if precision not in (None, *PRECISIONS):
        raise TFMQError(f"precision={precision!r}: unknown; use {nearest_names(str(precision), PRECISIONS)}.")
    frozen = () if compile is False else frozen_buffers(model.network, strict=strict)
    if sums is not ByteSums.EXACT:
        _warn(sums, strict=strict)
    with ExitStack() as stack:
        # Without a cache, the files live as long as the network that compiles from them.
        root = cache or stack.enter_context(tempfile.TemporaryDirectory(prefix="tfmq-lowering-"))
        wanted = Compilation(
            root=Path(root),
            keep=cache is not None,
            sums=sums,
            precision=precision,
            batch=batch,
            compile=compile,
            pack=pack,
        )
        lowered = ENGINES[engine](in_float32, wanted)
        weakref.finalize(lowered.network, stack.pop_all().close)
    total, int8 = _checked(lowered.kernels, strict=strict)
    lowering = {
        "target": target,
        "engine": engine,
        **_machine(gpu, sums),
        "pack": pack,
        **lowered.details,
        "flops": {"total": total, "int8": int8, **_float8_flops(lowered.kernels)},
        "kernels": kernels_to_json(lowered.kernels),
    }
    if found := [*notes, *(frozen if lowering["compiled"] else ())]:
        lowering["notes"] = found
    taken = [getattr(torch, spec["dtype"]) for spec in in_float32.interface.inputs.values()]
    device = torch.device("cpu") if gpu is None else gpu.device
    return LoweredModel(model, lowered.network, taken=taken, lowering=lowering, device=device)


def _machine(gpu: cuda.Gpu | None, sums: ByteSums) -> dict[str, Any]:
    """Return the report's entries on what computes."""
    if gpu is not None:
        return {"instructions": ["sm_{}{}".format(*gpu.capability)]}
    instructions = ["avx2"] if sums is ByteSums.PAIRS else int8_instructions()
    return {"instructions": instructions, "threads": torch.get_num_threads()}


def _warn(sums: ByteSums, *, strict: bool) -> None:
    """Warn about a CPU without int8 instructions.

    Raises TFMQError instead if `strict` and the CPU cannot multiply bytes at all.
    """
    which = "every layer runs"
    if sums is ByteSums.PAIRS:
        which = "layers with weights beyond 64 steps from zero, such as 8-bit weights, run"
    words = f"{NO_INT8}: {which} in float, with the same integers."
    if strict and sums is ByteSums.NONE:
        raise TFMQError(f'target "cpu": {words}')
    warnings.warn(words, stacklevel=5)  # at the caller of q.lower: past `lower`, `neutral` and `q.lower`


def _checked(kernels: Sequence[Kernel], *, strict: bool) -> tuple[int, int]:
    """Return the FLOPs in total and in int8.

    Raises TFMQError if `strict` and a quantized layer runs in float.
    """
    total, int8 = sum(k.flops for k in kernels), sum(k.int8_flops for k in kernels)
    log.info("lower: %.1f%% of %.3g FLOPs in int8", 100 * int8 / max(total, 1), total)
    slow = sum(k.flops for k in kernels if k.kernel == SLOW_GEMM)
    if slow > MOST * total:
        log.warning(
            'lower: OpenVINO computes %.0f%% of this network with %s, no faster than float; engine="torch" has a faster kernel.',
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
    return total, int8


def _float8_flops(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Return the report's entry on the FLOPs in float8, if there are any."""
    found = sum(k.flops for k in kernels if k.float8)
    return {"float8": found} if found else {}


def _require_engine(engine: str | None, target: str) -> None:
    """Raise TFMQError for an unknown engine, and for one of another target."""
    if engine not in (None, *ENGINES):
        raise TFMQError(f"engine={engine!r}: unknown; use {nearest_names(str(engine), ENGINES)}, or None.")
    if engine is not None and engine not in TARGETS[target]:
        other = next(t for t, engines in TARGETS.items() if engine in engines)
        raise TFMQError(f'engine={engine!r}: for target "{other}", not for "{target}"; leave it out.')


def _require_pack(pack: str | None) -> None:
    if pack not in (None, "int4"):
        raise TFMQError(f'pack={pack!r}: unknown; use "int4", or None.')


def _engine(
    engine: str | None, *, compile: bool | None, pack: str | None, model: QuantizedGraph, sums: ByteSums
) -> tuple[str, bool | None]:
    """Return the engine to use, and whether it compiles.

    Raises TFMQError for an option that the chosen engine does not have.
    """
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
    if pack is not None or compile is not None:  # options that OpenVINO does not have
        return "torch", compile
    if find_spec("openvino") is None:
        log.warning(
            'lower: openvino is not installed, so torch compiles instead; pip install "tfmq_fx[openvino]" for the faster engine.'
        )
        return "torch", compile
    if sums is ByteSums.PAIRS and (share := _linear_share(model)) > MOST:
        log.info('lower: %.0f%% of it is linear layers, which engine="torch" runs faster here', 100 * share)
        return "torch", False  # compiling a DiT-XL takes more than 22 GB
    return "openvino", None


def _linear_share(model: QuantizedGraph) -> float:
    """Return the share of FLOPs in linear layers that OpenVINO runs as `SLOW_GEMM` on CPUs that add pairs."""
    gm = flat_graph(model)
    PassManager(TO_INT8)(gm)
    saturating = {n.name for n in saturating_layers(gm)}
    layers = list(layers_of(gm))
    slow = (layer for layer in layers if layer.op == "linear" and layer.node not in saturating)
    int8 = sum(layer.flops for layer in slow if not layer.float_because)
    return int8 / max(sum(layer.flops for layer in layers), 1)
