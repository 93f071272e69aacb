"""How fast is one denoising step, compared with the alternatives on the same CPU?

    python -m benchmarks.inference_speed      DDPM CIFAR-10, SD-1.5 and DiT, published size, random weights
    python -m benchmarks.inference_speed --network ddpm-cifar10 --batch 2 --threads 1
    python -m benchmarks.inference_speed --reduced --without compile

All contenders run in one process. Each round calls every contender once, in a new random order; the medians
are compared. The first call, including compilation, is timed separately. If a contender cannot run, its error
is printed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._inductor.config
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tfmq_fx
from benchmarks.networks.zoo import ZOO, Entry

Step = Callable[[], Any]
Inputs = Mapping[str, Any]
Make = Callable[[nn.Module, Inputs], Step]


def eager(network: nn.Module, inputs: Inputs) -> Step:
    return lambda: network(**inputs)


def compiled(network: nn.Module, inputs: Inputs) -> Step:
    torch._dynamo.reset()
    step = torch.compile(network)
    return lambda: step(**inputs)


def compiled_bf16(network: nn.Module, inputs: Inputs) -> Step:
    half = copy.deepcopy(network).to(torch.bfloat16)
    cast = {
        n: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()
    }
    return compiled(half, cast)


def pt2e_x86(network: nn.Module, inputs: Inputs) -> Step:
    """Return a step by torchao's static quantization for x86 and Inductor.

    Weights and activations are int8, without temporal scales.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    # torchao puts an observer on the timestep, but its observers do not accept integers.
    inputs = {**inputs, "timestep": inputs["timestep"].float()}
    module = torch.export.export(network, (), dict(inputs), strict=False).module(check_guards=False)
    prepared = prepare_pt2e(module, quantizer)
    prepared(**inputs)
    return compiled(convert_pt2e(prepared), inputs)


def openvino_model(network: nn.Module, inputs: Inputs) -> tuple[Any, list[Any]]:
    """Return the float network as an OpenVINO model of fixed shapes, and its inputs."""
    import openvino

    tensors = {n: x for n, x in inputs.items() if isinstance(x, Tensor)}
    graph = tfmq_fx.capture(network, inputs)  # drops the arguments that are not tensors
    ordered = {str(n.target): tensors[str(n.target)] for n in graph.graph.find_nodes(op="placeholder")}
    model = openvino.convert_model(torch.export.export(graph, tuple(ordered.values()), strict=False))
    arrays = [x.numpy() for x in ordered.values()]
    model.reshape({i: list(x.shape) for i, x in zip(model.inputs, arrays, strict=True)})
    return model, arrays


def openvino_step(model: Any, arrays: list[Any], **settings: Any) -> Step:
    import openvino

    settings |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    step = openvino.Core().compile_model(model, "CPU", settings)
    return lambda: step(arrays, share_inputs=True)


def openvino_float(precision: str) -> Make:
    def make(network: nn.Module, inputs: Inputs) -> Step:
        return openvino_step(*openvino_model(network, inputs), INFERENCE_PRECISION_HINT=precision)

    return make


def nncf_static(network: nn.Module, inputs: Inputs) -> Step:
    import nncf

    model, arrays = openvino_model(network, inputs)
    model = nncf.quantize(model, nncf.Dataset([arrays]), preset=nncf.QuantizationPreset.MIXED)
    return openvino_step(model, arrays)


def quantized(network: nn.Module, inputs: Inputs, recipe: str, **changes: Any) -> tfmq_fx.QuantizedModel:
    """Return the network quantized by rounding to nearest: the rounding method does not change the speed."""
    tensors = {n: x for n, x in inputs.items() if isinstance(x, Tensor)}
    settings = dataclasses.replace(
        tfmq_fx.Recipe.preset(recipe),
        activation_observer="minmax",
        reconstruction=tfmq_fx.Reconstruction(method="nearest"),
        **changes,
    )
    data = tfmq_fx.CalibrationSet.from_tensors(tensors)
    return tfmq_fx.quantize(network, settings, calibration=data, timesteps=inputs["timestep"].unique())


def ours(
    recipe: str, precision: str, *, engine: str = "openvino", compile: bool | None = None, **changes: Any
) -> Make:
    def make(network: nn.Module, inputs: Inputs) -> Step:
        q = quantized(network, inputs, recipe, **changes)
        batch = len(inputs["timestep"])
        low = q.lower("cpu", engine=engine, precision=precision, batch=batch, compile=compile)
        report = low.report["lowering"]
        share = report["flops"]["int8"] / report["flops"]["total"]
        fallen = [k["path"] for k in report["kernels"] if k["fell_back"]]
        print(
            f"  {recipe} {engine} {precision} {changes or ''}: {share:.1%} of FLOPs in int8, fell back: {fallen or 'none'}, "
            f"compiled: {report['compiled']}"
        )
        print(f"  seconds: {report['seconds']}, compile {report['compiled_seconds']}")
        return lambda: low(**inputs)

    return make


CONTENDERS: dict[str, Make] = {
    "fp32 eager": eager,
    "fp32 torch.compile": compiled,
    "bf16 torch.compile": compiled_bf16,
    "torchao pt2e x86, static": pt2e_x86,
    "OpenVINO fp32": openvino_float("f32"),
    "OpenVINO bf16": openvino_float("bf16"),
    "NNCF + OpenVINO, static": nncf_static,
    "tfmq_fx w8a8, fp32 glue": ours("w8a8", "float32"),
    "tfmq_fx w8a8, bf16 glue": ours("w8a8", "bfloat16"),
    "tfmq_fx w8a8, bf16, all keyed": ours("w8a8", "bfloat16", keyed="all"),
    # NNCF quantizes the inputs of attention, too.
    "tfmq_fx w8a8, bf16, attention too": ours("w8a8", "bfloat16", attention_bits=8),
    # For CPUs without VNNI, on which 8-bit weights run in float.
    "tfmq_fx w4a8, fp32 glue": ours("w4a8", "float32"),
    "tfmq_fx w4a8, fp32, all keyed": ours("w4a8", "float32", keyed="all"),
    "tfmq_fx w4a8, torch int8, fp32 glue": ours("w4a8", "float32", engine="torch"),
    "tfmq_fx w4a8, torch, node by node": ours("w4a8", "float32", engine="torch", compile=False),
    "tfmq_fx w8a8, torch int8, fp32 glue": ours("w8a8", "float32", engine="torch"),
    "tfmq_fx w8a8, torch int8, bf16 glue": ours("w8a8", "bfloat16", engine="torch"),
}


def measure(
    network: nn.Module, inputs: Inputs, names: list[str], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return by contender the seconds of each call, and the seconds until the first call was done."""
    steps: dict[str, Step] = {}
    first = {}
    for name in names:
        start = time.perf_counter()
        try:
            steps[name] = CONTENDERS[name](network, inputs)
            steps[name]()
        except Exception as error:  # any error of another library is that row's result
            steps.pop(name, None)
            words = (str(error).strip().splitlines() or [""])[0][:200]
            print(f"  {name}: cannot run: {type(error).__name__}: {words}")
        else:
            first[name] = time.perf_counter() - start
    print(f"  {rounds} rounds", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in random.sample(sorted(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds, first


def batch_of(entry: Entry, *, published: bool, size: int) -> dict[str, Any]:
    """Return a batch of `size`: the zoo entry's two rows, at two timesteps, repeated."""
    rows = torch.arange(size) % 2
    given = entry.inputs(published)
    return {n: x[rows] if isinstance(x, Tensor) and x.dim() else x for n, x in given.items()}


def table_of(seconds: dict[str, list[float]], first: dict[str, float]) -> Table:
    table = Table("contender", "ms a step", "times fp32 eager", "first call s")
    medians = {n: statistics.median(s) for n, s in seconds.items()}
    for n, median in medians.items():
        ratio = f"{medians['fp32 eager'] / median:.2f}" if "fp32 eager" in medians else ""
        table.add_row(n, f"{1e3 * median:.1f}", ratio, f"{first[n]:.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--network", action="append", help="a name of the zoo; default ddpm-cifar10, sd-1.5, dit"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--reduced", action="store_true", help="the zoo's reduced sizes: minutes, not an hour"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], help="leave out contenders with this in their name"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="contenders with this in their name, alone")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch._inductor.config.freezing = (
        True  # so that weights are constants for the torch.compile contenders, too
    )
    names = [
        n
        for n in CONTENDERS
        if any(word in n for word in given.only) and not any(word in n for word in given.without)
    ]
    entries = {e.name: e for e in ZOO}
    for name in given.network or ["ddpm-cifar10", "sd-1.5", "dit"]:
        torch.manual_seed(0)
        network = entries[name].build(not given.reduced)
        inputs = batch_of(entries[name], published=not given.reduced, size=given.batch)
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        for threads in given.threads:
            torch.set_num_threads(threads)
            print(
                f"{name}, {parameters:.1f} M parameters, batch {given.batch}, {threads} threads", flush=True
            )
            with torch.no_grad():
                seconds, first = measure(network, inputs, names, given.rounds)
            Console(width=120).print(table_of(seconds, first))
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torchao", "openvino"))
    cpu = torch.cpu.get_capabilities()["cpu_name"]
    print(f"medians of {given.rounds} interleaved rounds; {versions}; {platform.machine()}, {cpu}")


if __name__ == "__main__":
    main()
