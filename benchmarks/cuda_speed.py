"""Are the int8 kernels for GPUs right, and how fast are they, in ten minutes on a GPU?

    python -m benchmarks.cuda_speed --minutes 10            all parts, one after the other, until the time is over
    python -m benchmarks.cuda_speed --parts correct micro   some parts: correct, micro, ddpm-cifar10, sd-1.5, sd-xl
    python -m benchmarks.cuda_speed --dry                   everything on the CPU, in tiny sizes: does the script run?

First every kernel against exact sums; then products of SD-XL's shapes, with every tile; then whole networks of the published
size with random weights: float32 and bfloat16 eager, compiled, compiled in a CUDA graph, and ours at W8A8 and W4A8. Each row
is printed when it is there, so that a run that is cut short is worth something. A part that would begin after the time is
over is left out. Whole networks are quantized on the GPU by rounding to nearest, with a batch of two for calibration: neither
changes the speed. `--save FILE` keeps all rows as JSON lines.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import fcntl
import functools
import itertools
import json
import logging
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.zoo import ZOO
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import first_line
from tfmq_fx.base.int8_kernels import CUDNN_PLANS, TILES, stored, stored_packed
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.recipe import SHARES
from tfmq_fx.runtimes import cuda, cuda_engine
from tfmq_fx.runtimes.torch_engine import lay_out

tfmq = torch.ops.tfmq
NETWORKS = ("ddpm-cifar10", "sd-1.5", "sd-xl")
PARTS = ("correct", "micro", *NETWORKS)

# Batch, height, width, C_in, C_out, taps; a linear has a width of 1 and no taps: rows, C_in, C_out.
CONVOLUTIONS = (
    (2, 128, 128, 320, 320, 3), (2, 64, 64, 640, 640, 3), (2, 32, 32, 1280, 1280, 3), (2, 64, 64, 1920, 640, 3),
)  # fmt: skip
LINEARS = ((8192, 640, 5120), (2048, 1280, 10240), (2048, 5120, 1280), (8192, 640, 640), (2048, 1280, 1280))


class Run:
    """The settings of a run: where it computes, how it measures, and how long it may take."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.dry: bool = given.dry
        self.device = torch.device("cpu" if given.dry else "cuda")
        self.end = time.monotonic() + 60 * given.minutes
        self.rounds: int = 2 if given.dry else given.rounds
        self.save: Path | None = given.save
        self.without: list[str] = given.without
        self.artefacts: dict[str, str] = dict(pair.split("=", 1) for pair in given.artefacts)
        self.prepared: dict[str, str] = dict(pair.split("=", 1) for pair in given.prepared)
        self.turn: Path | None = given.turn
        self.quantized: dict[str, tfmq_fx.QuantizedModel] = {}  # recipe -> the network of this part

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return float(self.end - time.monotonic())

    def loaded(self, recipe: str) -> tfmq_fx.QuantizedModel | None:
        """Return the artefact that was given for a recipe."""
        if recipe not in self.artefacts:
            return None
        found: tfmq_fx.QuantizedModel = tfmq_fx.load(self.artefacts[recipe]).to(self.device)
        return found

    def row(self, part: str, name: str, **values: Any) -> None:
        """Print and keep one result."""
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"[{self.left:4.0f} s left] {part:12} {name:44} {shown}", flush=True)
        if self.save is not None:
            with self.save.open("a") as file:
                file.write(json.dumps({"part": part, "name": name, **values}) + "\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Measure while no other run with the same file measures."""
        if self.turn is None:
            yield
            return
        with self.turn.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def microseconds(self, call: Callable[[], Any]) -> float:
        """Return the median time of a call."""
        if self.dry:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)
        from triton.testing import do_bench_cudagraph

        call()
        found: float = do_bench_cudagraph(call, rep=10, return_mode="median")
        return 1e3 * found


def integers(run: Run, *shape: int, low: int = -128, high: int = 128) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, device=run.device)


def kernel_of(
    x: Tensor,
    w: Tensor,
    *,
    zero: int = 0,
    packed: Tensor | None = None,
    place: tuple[Any, ...] = (),
    **more: Any,
) -> Callable[[], Tensor]:
    """Return a call of the operator: of a linear for a weight of two dimensions. packed: zero points of 4-bit weights.

    The weight's layout is made here, not in the call.
    """
    weight = stored(w) if packed is None else stored_packed(w)
    signed = w if packed is None else w - packed.reshape(-1, *[1] * (w.dim() - 1))
    correction = zero * signed.flatten(1).sum(1, dtype=torch.int64) if zero else None
    names = ("scale", "bias", "row_scale", "residual", "y_factor")
    given: dict[str, Any] = {
        "scale": torch.ones(len(w), device=w.device),
        "activation": "none",
        "tile": [],
        "y_scale": 1.0,
    }
    given |= {"y_zero_point": 0, "dtype": torch.float32} | more
    parts = [given.get(n) for n in names]
    parts.insert(1, None if correction is None else correction.int())
    rest = [given[n] for n in ("activation", "tile", "y_scale", "y_zero_point", "dtype")]
    if w.dim() == 2:
        return lambda: tfmq.int8_linear(x, weight, packed, *parts, *rest)
    stride, padding, dilation = place or (1, w.shape[2] // 2, 1)
    twice = ([stride] * 2, [padding] * 2, [dilation] * 2)
    return lambda: tfmq.int8_conv2d(x, weight, packed, *parts, *twice, zero, *rest)


def tiles(run: Run) -> list[tuple[int, ...]]:
    """Return the tiles to check: by shape, Triton's, cuDNN's."""
    return [(), *(TILES[:1] if run.dry else cuda_engine.candidates(True))]


def exact_sums(x: Tensor, w: Tensor, zero: int, place: tuple[int, int, int]) -> Tensor:
    """Return the sums of (x - zero) * w in float64, which holds them exactly."""
    x, w = x.double() - zero, w.double()
    stride, padding, dilation = place
    y: Tensor = x @ w.T if w.dim() == 2 else F.conv2d(x, w, None, stride, padding, dilation)
    return y


def correct(run: Run) -> None:
    """Compare every form of the kernel with exact sums, and raise an error where one is wrong."""
    wrong = 0
    pictures = [(1, 17, 9, 11, 8), (2, 64, 16, 16, 64), (3, 320, 13, 7, 96), (2, 40, 8, 8, 200)]
    places = [(1, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 2)]
    for (n, c, h, w, o), place, zero, is_packed in itertools.product(
        pictures[:2] if run.dry else pictures, places, (0, -7), (False, True)
    ):
        taps = 1 if place == (1, 0, 1) else 3
        x = integers(run, n, c, h, w).contiguous(memory_format=torch.channels_last)
        weight = integers(run, o, c, taps, taps, low=0 if is_packed else -128, high=16 if is_packed else 128)
        zeros = integers(run, o, low=-3, high=18) if is_packed else None
        signed = weight if zeros is None else weight - zeros[:, None, None, None]
        expected = exact_sums(x, signed, zero, place)
        for tile in tiles(run):
            name = (
                f"conv {n}x{c}x{h}x{w}->{o} {place} z {zero} {'int4' if is_packed else 'int8'} {list(tile)}"
            )
            wrong += check(
                run,
                name,
                kernel_of(x, weight, zero=zero, packed=zeros, place=place, tile=list(tile)),
                expected,
            )
    for rows, c, o in [(5, 33, 7), (300, 640, 130)]:
        x, weight = integers(run, rows, c), integers(run, o, c)
        expected = exact_sums(x, weight, 5, (1, 0, 1))
        for tile in tiles(run):
            wrong += check(
                run,
                f"linear {rows}x{c}->{o} {list(tile)}",
                kernel_of(x, weight, zero=5, tile=list(tile)),
                expected,
            )
    wrong += correct_epilogues(run)
    run.row("correct", "kernels that are wrong", count=wrong)
    if wrong:
        raise SystemExit("a kernel is wrong: no speed is worth measuring")


def check(run: Run, name: str, call: Callable[[], Tensor], expected: Tensor, *, within: float = 0.0) -> int:
    """Return 1, and print a row, if a call gives something else than is expected. within: the largest difference allowed."""
    try:
        got = call()
    except Exception as error:  # Triton's own types: a tile that this GPU cannot run is no wrong result
        run.row("correct", name, cannot_run=f"{type(error).__name__}: {first_line(error)}"[:150])
        return 0
    reference = expected.float() if within == 0 else expected
    difference = (got.double() - reference.double()).abs().max().item()
    if difference <= within:
        return 0
    run.row("correct", name, difference=difference, largest=expected.abs().max().item())
    return 1


def correct_epilogues(run: Run) -> int:
    """Check what follows a sum, in every dtype."""
    wrong = 0
    x, w = integers(run, 2, 64, 9, 7), integers(run, 48, 64, 1, 1)
    sums = exact_sums(x, w, 3, (1, 0, 1))
    scale, bias = torch.rand(48, device=run.device) / 20000, torch.randn(48, device=run.device)
    rows, feature = (
        torch.rand(2, 1, 1, 1, device=run.device) + 0.5,
        torch.randn(2, 48, 1, 1, device=run.device),
    )
    v = sums * scale.double()[:, None, None] * rows.double() + bias.double()[:, None, None] + feature.double()
    acts = {"none": v, "silu": F.silu(v), "gelu": F.gelu(v), "gelu_tanh": F.gelu(v, approximate="tanh")}
    parts: dict[str, Any] = {"scale": scale, "bias": bias, "row_scale": rows, "residual": feature}
    bounds = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
    more: dict[str, Any]
    for (activation, y), (dtype, bound) in itertools.product(acts.items(), bounds.items()):
        call = kernel_of(x, w, zero=3, place=(1, 0, 1), activation=activation, dtype=dtype, **parts)
        wrong += check(run, f"epilogue {activation} {dtype}", call, y, within=bound * y.abs().max().item())
    y = (acts["silu"] * rows.double() / 0.02).clamp(-28, 227) - 100
    more = {
        "activation": "silu",
        "y_factor": rows,
        "y_scale": 0.02,
        "y_zero_point": -100,
        "dtype": torch.int8,
    }
    return wrong + check(
        run, "epilogue to bytes", kernel_of(x, w, zero=3, place=(1, 0, 1), **parts, **more), y, within=0.501
    )


def micro(run: Run) -> None:
    """Measure single products: bfloat16, int8 with every tile, and int4."""
    shrink = 16 if run.dry else 1
    for n, h, w, c, o, taps in CONVOLUTIONS:
        n, h, w, c, o = (max(size // shrink, 1) for size in (n, h, w, c, o))
        x = integers(run, n, c, h, w).contiguous(memory_format=torch.channels_last)
        convolve = functools.partial(F.conv2d, padding=taps // 2)
        compare(
            run,
            f"conv {taps}x{taps} {c}->{o} at {h}x{w}, batch {n}",
            x,
            integers(run, o, c, taps, taps),
            convolve,
        )
    for rows, c, o in LINEARS:
        rows, c, o = (max(size // shrink, 1) for size in (rows, c, o))
        compare(run, f"linear {rows}x{c}x{o}", integers(run, rows, c), integers(run, o, c), F.linear)


def compare(run: Run, name: str, x: Tensor, weight: Tensor, plain: Callable[..., Tensor]) -> None:
    """Print the microseconds of one product in bfloat16, by `plain`, and on our kernels."""
    if run.left < 5:
        return
    bias, scale = (
        torch.randn(len(weight), device=run.device).bfloat16(),
        torch.rand(len(weight), device=run.device),
    )
    more: dict[str, Any] = {"bias": bias, "scale": scale / 1000, "dtype": torch.bfloat16}
    x_half, weight_half = x.bfloat16(), weight.bfloat16()
    if weight.dim() == 4:
        weight_half = weight_half.contiguous(memory_format=torch.channels_last)
    found: dict[str, float] = {"bf16": run.microseconds(lambda: plain(x_half, weight_half, bias))}
    for tile in [(), *cuda_engine.candidates(True)]:
        label = (
            "default" if not tile else f"cuDNN {tile[1]}" if tile in CUDNN_PLANS else "x".join(map(str, tile))
        )
        try:
            found[label] = run.microseconds(kernel_of(x, weight, tile=list(tile), **more))
        except Exception as error:  # Triton's own types
            print(f"  {label}: cannot run: {first_line(error)[:150]}", flush=True)
    nibbles = weight & 15
    zeros = integers(run, len(weight), low=0, high=16)
    found["int4"] = run.microseconds(kernel_of(x, nibbles, packed=zeros, **more))
    best = min((n for n in found if n not in ("bf16", "int4")), key=lambda n: found[n])
    run.row("micro", name, **found, best=best, times_bf16=found["bf16"] / found[best])


Inputs = Mapping[str, Any]
Step = Callable[[], Any]


def eager(network: nn.Module, inputs: Inputs, run: Run) -> Step:  # noqa: ARG001
    return lambda: network(**inputs)


def half(network: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    cast = pytree.tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, dict(inputs))
    return copy.deepcopy(network).bfloat16().to(memory_format=torch.channels_last), cast


def bf16(network: nn.Module, inputs: Inputs, run: Run) -> Step:
    return eager(*half(network, inputs), run)


def bf16_compiled(network: nn.Module, inputs: Inputs, run: Run) -> Step:
    torch._dynamo.reset()
    own, cast = half(network, inputs)
    step = torch.compile(own, backend="eager" if run.dry else "inductor")
    return lambda: step(**cast)


def recorded(step: Step, run: Run) -> Step:
    """Return a step that replays what `step` launches, as one CUDA graph."""
    if run.dry:
        return step

    def tensors() -> list[Tensor]:
        return [x for x in pytree.tree_leaves(step()) if isinstance(x, Tensor)]

    replayed, _ = cuda_engine.record(tensors, [], pool=None)
    return replayed


def ours(recipe: str, **settings: Any) -> Callable[[nn.Module, Inputs, Run], Step]:
    def make(network: nn.Module, inputs: Inputs, run: Run) -> Step:
        start = time.perf_counter()
        if recipe in run.prepared:
            return prepared_step(run, recipe, inputs, settings)
        if recipe not in run.quantized:
            # One at a time: a large network's fills gigabytes.
            run.quantized = {recipe: run.loaded(recipe) or quantized(network, inputs, recipe)}
        q = run.quantized[recipe]
        middle = time.perf_counter()
        wanted = settings | ({"compile": False} if run.dry else {})
        low = q.lower("cuda", batch=len(inputs["timestep"]), **wanted)
        report = low.report["lowering"]
        share = report["flops"]["int8"] / report["flops"]["total"]
        reasons = {k["reason"] for k in report["kernels"] if k["fell_back"]}
        run.row(
            recipe, f"quantized and lowered {settings or ''}",
            quantizing_s=middle - start, lowering_s=time.perf_counter() - middle, int8_share=share,
            weight_MB=report["weight_bytes"] / 1e6, compiled=report["compiled"], recorded=report["recorded"],
            because=report.get("not_compiled_because", report.get("not_recorded_because", "")), fell_back=sorted(reasons),
        )  # fmt: skip
        run.row(recipe, "lowered against q", relative_error=relative_error(low(**inputs), q(**inputs)))
        return lambda: low(**inputs)

    return make


def relative_error(output: Any, reference: Any) -> float:
    """Return the root mean squared error of a network's first output, relative to the reference's size."""
    got, expected = (pytree.tree_leaves(y)[0].float() for y in (output, reference))
    error: float = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
    return error


class AsItIs:
    """The calling convention of a prepared graph: its outputs in a row."""

    def of(self, outputs: Any) -> Any:
        return outputs


def prepared_step(run: Run, recipe: str, inputs: Inputs, settings: Mapping[str, Any]) -> Step:
    """Return a call of a network that `benchmarks.prepared` wrote."""
    from benchmarks import prepared

    start = time.perf_counter()
    gm = prepared.read(Path(run.prepared[recipe]), run.device)
    read = time.perf_counter()
    by_name = {n: x for n, (_, x) in leaves(dict(inputs)).items()}
    tensors = [by_name[str(n.target)] for n in gm.graph.find_nodes(op="placeholder")]
    compile = False if run.dry else settings.get("compile")
    nesting: Any = AsItIs()
    low = cuda_engine.CudaNetwork(gm, nesting=nesting, compile=compile, folder=None, device=run.device)
    got = low(*tensors)
    lowered = time.perf_counter()
    error = relative_error(got, lay_out(fresh(gm))(*tensors))
    run.row(
        recipe, f"prepared, lowered {dict(settings) or ''}", reading_s=read - start, lowering_s=lowered - read,
        error_to_node_by_node=error, because=low.not_compiled_because or low.not_recorded_because,
    )  # fmt: skip
    return lambda: low(*tensors)


def quantized(network: nn.Module, inputs: Inputs, recipe: str) -> tfmq_fx.QuantizedModel:
    """Return the network quantized where it is, by rounding to nearest, with everything that costs minutes turned off."""
    nothing_chosen: dict[str, Any] = dict.fromkeys(SHARES, 0.0)
    settings = dataclasses.replace(
        tfmq_fx.Recipe.preset(recipe),
        **nothing_chosen,
        activation_observer="minmax",
        smooth=None,
        keyed="all",  # scales by timestep everywhere: what costs most
        shared_zero_point=True,
        reconstruction=tfmq_fx.Reconstruction(method="nearest"),
    )
    tensors = {n: x for n, x in inputs.items() if isinstance(x, (Tensor, Mapping))}
    data = tfmq_fx.CalibrationSet.from_tensors(tensors)
    return tfmq_fx.quantize(network, settings, calibration=data, timesteps=inputs["timestep"].unique())


CONTENDERS: dict[str, Callable[[nn.Module, Inputs, Run], Step]] = {
    "fp32 eager": eager,
    "bf16 eager": bf16,
    "w8a8, node by node": ours("w8a8", compile=False),
    "bf16 compile": bf16_compiled,
    "w8a8": ours("w8a8"),
    "w8a8, tiles measured": ours("w8a8", compile=True),
    "w4a8, packed": ours("w4a8", pack="int4"),
}


def whole(run: Run, name: str) -> None:
    """Measure a whole network: every contender, and its CUDA graph, peak memory and longest kernels."""
    network, inputs = built(run, name)
    run.quantized = {}
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{name}: {parameters:.0f} M parameters, batch {len(inputs['timestep'])}", flush=True)
    with torch.no_grad():
        for contender, make in CONTENDERS.items():
            if run.left < 20 or any(word in contender for word in run.without):
                print(f"  {contender}: left out, {run.left:.0f} s are left", flush=True)
                continue
            start = time.perf_counter()
            try:
                step = make(network, inputs, run)
                step()
                run.synchronize()
                first = time.perf_counter() - start
                with run.alone():
                    time_step(run, name, contender, step, first=first)
                    if contender == "bf16 compile":
                        time_step(run, name, "bf16 compile, CUDA graph", recorded(step, run), first=0.0)
            except Exception as error:  # the row's result, and the next contender's turn
                traceback.print_exc(limit=-6)
                run.row(name, contender, error=f"{type(error).__name__}: {first_line(error)}"[:300])
            step = None  # type: ignore[assignment]
            torch._dynamo.reset()
            if not run.dry:
                torch.cuda.empty_cache()


def built(run: Run, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network with random weights, made on the device, and a batch of two."""
    entry = next(e for e in ZOO if e.name == name)
    torch.manual_seed(0)
    with run.device:
        network = entry.build(not run.dry)
    network = network.to(run.device).requires_grad_(False)
    inputs = pytree.tree_map_only(Tensor, lambda x: x.to(run.device), entry.inputs(not run.dry))
    return network, inputs


def time_step(run: Run, name: str, contender: str, step: Step, *, first: float) -> None:
    if not run.dry:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(run.rounds):
        run.synchronize()
        start = time.perf_counter()
        step()
        run.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = 0.0 if run.dry else torch.cuda.max_memory_allocated() / 2**30
    run.row(name, contender, ms=1e3 * statistics.median(seconds), first_s=first, peak_GiB=peak)
    for kernel, microseconds, share in longest(run, step):
        print(f"      {share:5.1%} {microseconds:9.0f} us  {kernel[:100]}", flush=True)


def longest(run: Run, step: Step) -> Iterator[tuple[str, float, float]]:
    """Yield the ten kernels with the most time in a step: name, microseconds, share."""
    if run.dry:
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        step()
        run.synchronize()
    found = [e for e in profiled.key_averages() if e.device_type.name == "CUDA"]
    total = sum(e.self_device_time_total for e in found) or 1.0
    for event in sorted(found, key=lambda e: -e.self_device_time_total)[:10]:
        yield event.key, event.self_device_time_total, event.self_device_time_total / total


def stand_in() -> None:
    """Let the CPU stand in for the GPU: for `--dry`."""
    gpu = cuda.Gpu(device=torch.device("cpu"), name="stand-in", capability=(9, 0))
    cuda.require_gpu = lambda: gpu
    cuda_engine.record = lambda function, inputs, *, pool: (function, pool)  # noqa: ARG005


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--without", nargs="+", default=[], help="leave out contenders with this in their name"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", type=Path)
    parser.add_argument(
        "--artefacts",
        nargs="+",
        default=[],
        metavar="RECIPE=FOLDER",
        help="quantized before, instead of here",
    )
    parser.add_argument(
        "--prepared", nargs="+", default=[], metavar="RECIPE=FILE", help="written by benchmarks.prepared"
    )
    parser.add_argument(
        "--turn", type=Path, help="a file: runs that were given the same one measure one after the other"
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, in tiny sizes")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("tfmq_fx.runtimes").setLevel(logging.INFO)  # what a run that is cut short was at
    run = Run(given)
    if given.dry:
        stand_in()
    gpu = cuda.require_gpu()
    print(f"{gpu.name}, compute capability {gpu.capability}, torch {torch.__version__}", flush=True)
    for part in given.parts:
        if run.left < 10:
            print(f"{part}: left out, the time is over", flush=True)
        elif part in NETWORKS:
            whole(run, part)
        else:
            {"correct": correct, "micro": micro}[part](run)


if __name__ == "__main__":
    main()
