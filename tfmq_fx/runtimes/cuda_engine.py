"""Run a quantized graph on int8 kernels on a GPU: Triton's products, Inductor's kernels around them, one CUDA graph.

Each shape of inputs has one CUDA graph, which is recorded once and replayed. A call copies its inputs to where the graph
reads them; the timestep is one of them, so that one graph serves all steps. Without `compile`, the graph runs node by node
once, while it is recorded.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from tfmq_fx.artefact.outside import to_device
from tfmq_fx.artefact.program import flat_graph
from tfmq_fx.artefact.quantized_graph import QuantizedGraph, example_inputs
from tfmq_fx.base.arithmetic import ByteSums
from tfmq_fx.base.cudnn_int8 import frontend
from tfmq_fx.base.errors import TFMQError, first_line
from tfmq_fx.base.files import replace_files
from tfmq_fx.base.int8_kernels import CUDNN_PLANS, TILES
from tfmq_fx.base.tracing import tracing
from tfmq_fx.graph.fakes import fill_fake_values
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import attribute, fresh, set_buffer
from tfmq_fx.graph.written import kept, written_buffers
from tfmq_fx.passes.int8.bfloat16_glue import bfloat16_glue
from tfmq_fx.passes.int8.cuda_kernels import cuda_kernels
from tfmq_fx.passes.int8.float8_kernels import float8_kernels
from tfmq_fx.passes.int8.fold_weights import fold_weights, keep_what_is_read
from tfmq_fx.passes.int8.fuse_epilogues import fuse_epilogues
from tfmq_fx.passes.int8.kernels import GPU_KERNELS, arguments_of, set_arguments
from tfmq_fx.passes.int8.look_up_together import look_up_together
from tfmq_fx.passes.int8.merge_linears import merge_linears
from tfmq_fx.passes.int8.share_quantized import share_quantized
from tfmq_fx.passes.int8.signed_activations import signed_activations
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.runtimes import cuda
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
from tfmq_fx.runtimes.layers import layers_of
from tfmq_fx.runtimes.regions import compile_regions
from tfmq_fx.runtimes.torch_engine import Prepared, dtypes_of, kernels_of_graph, lay_out, weight_bytes

log = logging.getLogger(__name__)

IN_FLOAT32 = ("correction", "bias")  # of a kernel's constants: what cuDNN takes in no other dtype
WARM_UP = 2  # calls before a recording: libraries choose their kernels, and Triton compiles


def lower_cuda(model: QuantizedGraph, wanted: Compilation) -> Lowered:
    """Put int8 kernels for GPUs into the graph, compile what is between them, and record it."""
    gpu = cuda.require_gpu()
    start = time.perf_counter()
    precision = choose_precision(wanted.precision, has_bfloat16=True)
    prepared = prepare_graph(
        model, precision=precision, pack=wanted.pack, device=gpu.device, capability=gpu.capability
    )
    folder = None
    if wanted.keep:
        folder = wanted.root / cache_key(model, json.dumps([gpu.name, precision, wanted.pack]))
    network = CudaNetwork(
        prepared.gm, nesting=Nesting(model.network), compile=wanted.compile, folder=folder, device=gpu.device
    )
    inputs = [x.to(gpu.device) for x in example_inputs(model, batch=wanted.batch).values()]
    with kept(written_buffers(prepared.gm)):  # the example is no call of the user's
        network(*inputs)
    not_compiled, not_recorded = network.not_compiled_because, network.not_recorded_because
    details = {
        "library": f"torch {torch.__version__}",
        "device": gpu.name,
        "precision": precision,
        "compiled": not not_compiled,
        "recorded": not not_recorded,
        "weight_bytes": weight_bytes(prepared.gm),
        **({"not_compiled_because": not_compiled} if not_compiled else {}),
        **({"not_recorded_because": not_recorded} if not_recorded else {}),
        "seconds": {"first": round(time.perf_counter() - start, 2)},
    }
    return Lowered(network=network, kernels=prepared.kernels, details=details)


def prepare_graph(
    model: QuantizedGraph,
    *,
    precision: str,
    pack: str | None,
    device: torch.device,
    capability: tuple[int, int] | None = None,
) -> Prepared:
    """Return the flat graph of torch's operators and int8 kernels, on the device. The model stays where it is.

    precision, pack: as in `lower`. capability: as in `float8_kernels`. Raises TFMQError naming a node that cannot run.
    """
    gm = flat_graph(model)
    PassManager(TO_INT8)(gm)
    layers = list(layers_of(gm))
    fill_fake_values(gm)
    kernels = functools.partial(cuda_kernels, pack=pack)
    of_float8 = functools.partial(float8_kernels, capability=capability)
    after = [fuse_epilogues, share_quantized, merge_linears, look_up_together]
    PassManager([signed_activations, kernels, of_float8, *after])(gm)
    fold_weights(gm)
    keep_what_is_read(gm)
    to_device(gm, device)
    inputs = {n: x.to(device) for n, x in example_inputs(model, batch=1).items()}
    dtypes = dtypes_of(gm, inputs)
    if precision == "bfloat16":
        bfloat16_glue(gm, dtypes=dtypes, precise=set(placeholders(model.temporal_block)))
        dtypes_of(gm, inputs)  # to name an operator that lacks bfloat16
    found = kernels_of_graph(gm, layers, PRECISIONS[precision], ByteSums.EXACT)
    keep_what_is_read(gm)
    return Prepared(gm=gm, kernels=found)


class CudaNetwork(nn.Module):
    """The graph on a GPU, made ready for each shape of inputs when that comes first; the last four are kept.

    Threads may call it at once: each call has the recording's memory for itself until its outputs are copied.

    compile: as in `lower`. folder: keeps what was measured and compiled; None: torch's own cache does.
    """

    def __init__(
        self,
        gm: GraphModule,
        *,
        nesting: Nesting,
        compile: bool | None,
        folder: Path | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.gm, self.nesting, self.wanted, self.folder, self.device = gm, nesting, compile, folder, device
        self.not_compiled_because = "compile=False" if compile is False else ""
        self.not_recorded_because = ""
        self.networks = PerShape(self.make)
        self.turn = threading.RLock()  # one call at a time has the memory of the recordings, which all share
        self.pool: Any = None

    @property
    def seconds(self) -> dict[int, float]:
        """Return, by batch size, the seconds that making it ready took."""
        return self.networks.seconds

    def forward(self, *inputs: Tensor) -> Any:
        given = [x.detach().contiguous() for x in inputs]  # compiled code has fixed strides
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.no_grad(), here:  # streams and recordings are those of the current device
            return self.nesting.of(self.networks.of(given)(*given))

    def make(self, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """Return what computes inputs of these shapes."""
        gm = fresh(self.gm)
        with kept(written_buffers(gm)):  # what runs here is no call of the user's
            return self._made(gm, inputs)

    def _made(self, gm: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        tiles = candidates(self.wanted)
        if len(tiles) > 1:
            set_tiles(gm, tiles_of(gm, inputs, tiles, file=self._file(inputs)))
        function = self._compiled(gm, inputs)
        with self.turn:
            try:
                recorded, self.pool = record(function, inputs, pool=self.pool)
            except RuntimeError as error:  # of CUDA, for what a recording does not allow
                self.not_recorded_because = first_line(error)
                log.warning(
                    "lower: no CUDA graph, each kernel is launched by itself: %s", self.not_recorded_because
                )
                return function

        def replayed(*given: Tensor) -> Sequence[Tensor]:
            with self.turn:
                return recorded(*given)

        return replayed

    def _file(self, inputs: Sequence[Tensor]) -> Path | None:
        return None if self.folder is None else self.folder / f"tiles-{folder_for(inputs)}.json"

    def _compiled(self, gm: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the graph compiled by Inductor; itself with compile=False, and where that fails with compile=None."""
        if self.wanted is not False:
            one = functools.partial(compiled, folder=self.folder)
            try:
                # What writes to memory has an order, which regions do not keep.
                return one(gm, inputs) if written_buffers(gm) else compile_regions(fresh(gm), inputs, one)
            except Exception as error:  # Inductor and Triton raise many types
                shapes = ", ".join(map(str, shapes_of(inputs)))
                why_not = f"compiling for inputs of {shapes}: {type(error).__name__}: {first_line(error)}"
                if self.wanted:
                    raise TFMQError(
                        f"compile=True: {why_not}; use compile=False, which runs the same kernels node by node."
                    ) from error
                self.not_compiled_because = why_not
                log.warning("lower: not compiled, runs node by node: %s", why_not)
        return lay_out(fresh(gm))


@tracing()
def compiled(gm: GraphModule, inputs: Sequence[Tensor], *, folder: Path | None) -> Callable[..., Any]:
    """Return the graph compiled by Inductor for inputs of these shapes. folder: keeps the code for the next process."""
    own: dict[str, str] = {} if folder is None else {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    with mock.patch.dict(os.environ, own) if own else nullcontext(), torch.no_grad():
        made: Callable[..., Any] = torch._inductor.compile(fresh(gm), list(inputs))
        made(*inputs)  # it loads its kernels at the first call, from that folder
    return made


def record(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], *, pool: Any
) -> tuple[Callable[..., Sequence[Tensor]], Any]:
    """Record the kernels that `function` launches for inputs of these shapes, and return what replays them, and its memory.

    pool: the memory of other recordings, which this one shares: one at a time may be replayed. None: there is none yet.
    """
    taken = [x.clone() for x in inputs]
    apart = torch.cuda.Stream()
    apart.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(apart):
        for _ in range(WARM_UP):
            function(*taken)
    torch.cuda.current_stream().wait_stream(apart)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = function(*taken)
    done = torch.cuda.Event()
    done.record()

    def replayed(*given: Tensor) -> Sequence[Tensor]:
        done.wait()  # for the last call, which another stream may have made
        for own, x in zip(taken, given, strict=True):
            own.copy_(x)
        graph.replay()
        outputs = [y.clone() for y in results]
        done.record()
        return outputs

    return replayed, graph.pool()


Tile = tuple[int, ...]
Measure = Callable[[Callable[[], Any]], float]


def candidates(compile: bool | None) -> tuple[Tile, ...]:
    """Return the tiles among which each kernel's is chosen: Triton's and cuDNN's plans if `compile`, else () alone, by shape.

    cuDNN compiles a kernel for every shape and epilogue, in about a second each.
    """
    return (*TILES, *(CUDNN_PLANS if frontend() else ())) if compile else ((),)


def tiles_of(
    gm: GraphModule,
    inputs: Sequence[Tensor],
    tiles: Sequence[Tile],
    *,
    file: Path | None,
    measure: Measure | None = None,
) -> dict[str, Tile]:
    """Return the fastest of these tiles for every int8 kernel of the graph, by its node's name; from the file if that is there.

    Kernels of one shape are measured once. measure: returns the milliseconds of a call.
    """
    if file is not None and file.exists():
        return {name: tuple(tile) for name, tile in json.loads(file.read_text()).items()}
    run = _Tiles(gm, tiles, measure or _milliseconds)
    with torch.no_grad():
        run.run(*inputs)
    if file is not None:
        replace_files(file, lambda new: new.write_text(json.dumps(run.found)))
    return run.found


def set_tiles(gm: GraphModule, tiles: dict[str, Tile]) -> None:
    """Let the int8 kernels of a graph use these tiles, by their nodes' names."""
    for node in list(gm.graph.nodes):
        if node.name in tiles:
            set_arguments(node, tile=list(tiles[node.name]))
            if tiles[node.name] in CUDNN_PLANS:
                _put_in_float32(gm, node)
    gm.recompile()


def _put_in_float32(gm: GraphModule, kernel: Node) -> None:
    """Cast a kernel's constants here, once."""
    for name in IN_FLOAT32:
        constant = arguments_of(kernel)[name]
        if constant is not None and attribute(gm, str(constant.target)).dtype != torch.float32:
            set_buffer(gm, f"{kernel.name}_{name}_float32", attribute(gm, str(constant.target)).float())
            with gm.graph.inserting_before(kernel):
                set_arguments(kernel, **{name: gm.graph.get_attr(f"{kernel.name}_{name}_float32")})


def _milliseconds(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    call()  # what cannot run must not fail while it is recorded
    torch.cuda.synchronize()
    found: float = do_bench_cudagraph(call, rep=2, return_mode="median")
    return found


class _Tiles(Interpreter):
    """An interpreter that runs the graph once, and each int8 kernel of a new shape with every tile."""

    def __init__(self, gm: GraphModule, tiles: Sequence[Tile], measure: Measure) -> None:
        super().__init__(gm)
        self.tiles, self.measure = tiles, measure
        self.found: dict[str, Tile] = {}
        self.known: dict[Any, Tile] = {}

    def run_node(self, n: Node) -> Any:
        if n.target in GPU_KERNELS:
            args, _ = self.fetch_args_kwargs_from_env(n)
            given = dict(zip(arguments_of(n), args, strict=True))
            key = (n.target, *(_form(name, value) for name, value in given.items()))
            if key not in self.known:
                self.known[key] = self._fastest(n.target, given)
            self.found[n.name] = self.known[key]
        return super().run_node(n)

    def _fastest(self, kernel: Any, given: dict[str, Any]) -> Tile:
        def milliseconds(tile: Tile) -> float:
            floats = IN_FLOAT32 if tile in CUDNN_PLANS else ()
            own = {n: x.float() if n in floats and x is not None else x for n, x in given.items()}
            try:
                return self.measure(lambda: kernel(*(own | {"tile": list(tile)}).values()))
            except Exception as error:  # Triton's own types: a GPU with less shared memory, for one
                log.info("lower: tile %s cannot run here: %s", tile, first_line(error))
                return float("inf")

        packed = given["weight_zero"] is not None  # which cuDNN does not read
        return min((t for t in self.tiles if not (packed and t in CUDNN_PLANS)), key=milliseconds)


def _form(name: str, value: Any) -> Any:
    """Return what a kernel's time depends on of one of its arguments."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if name in ("y_scale", "y_zero_point"):
        return None
    return bool(value) if name == "x_zero_point" else str(value)
