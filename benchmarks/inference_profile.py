"""Where do the milliseconds of a denoising step go, and how far is that from this CPU's own limits?

    OMP_NUM_THREADS=1 python -m benchmarks.inference_profile

Profiles the DDPM CIFAR-10 network at W8A8 with OpenVINO's kernels, by kind of kernel, from OpenVINO's own
counters. For comparison it measures the rates of large matrix products in float32, bfloat16 and int8, on the
same core in the same process. The int8 operations at that rate give the least time that the int8 layers can
take; the other kernels take the rest of the step.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tfmq_fx
from benchmarks.inference_speed import batch_of, quantized
from benchmarks.networks.zoo import ZOO
from tfmq_fx.base.onednn import FLOAT, NO_POST_OP, onednn
from tfmq_fx.runtimes.openvino_engine import PRODUCTS, Compiled, is_int8

SIZE = 2048


def rate(product: Callable[[], Any], *, rounds: int = 7) -> float:
    """Return billions of multiplications and additions per second, as the median over the rounds."""
    product()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / statistics.median(seconds) / 1e9


def int8_product() -> Callable[[], Tensor]:
    x = torch.randint(0, 255, (SIZE, SIZE), dtype=torch.uint8)
    w = torch.ops.onednn.qlinear_prepack(
        torch.randint(-128, 127, (SIZE, SIZE), dtype=torch.int8), [SIZE, SIZE]
    )
    scales, zeros = torch.ones(SIZE), torch.zeros(SIZE, dtype=torch.int32)
    arguments = (x, 1.0, 128, w, scales, zeros, None, *FLOAT, torch.float32, *NO_POST_OP)
    return lambda: onednn.qlinear_pointwise.default(*arguments)


def rates() -> dict[str, float]:
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    half = a.bfloat16(), b.bfloat16()
    return {
        "float32": rate(lambda: a @ b),
        "bfloat16": rate(lambda: half[0] @ half[1]),
        "int8": rate(int8_product()),
    }


def profile(
    q: tfmq_fx.QuantizedModel, low: tfmq_fx.LoweredModel, inputs: list[Tensor], *, rounds: int = 21
) -> dict[str, float]:
    """Return the median milliseconds of a call by kind of kernel; "" is the whole call."""
    network: Any = low.network
    again = Compiled(network.folder, model=q, settings={**network.settings, "PERF_COUNT": True})
    request = again.compiled_for([inputs[i] for i in network.order]).compiled.create_infer_request()
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        start = time.perf_counter()
        request.infer([inputs[i].numpy() for i in network.order], share_inputs=True)
        found[""].append(1e3 * (time.perf_counter() - start))
        by_kind: dict[str, float] = defaultdict(float)
        for node in request.profiling_info:
            kind = f"{node.node_type}, int8" if is_int8(node.exec_type) else node.node_type
            by_kind[kind] += node.real_time.total_seconds() * 1e3
        for kind, milliseconds in by_kind.items():
            found[kind].append(milliseconds)
    return {kind: statistics.median(values) for kind, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="ddpm-cifar10", help="a name of the zoo")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--reduced", action="store_true")
    args = parser.parse_args()
    entry = {e.name: e for e in ZOO}[args.network]
    torch.manual_seed(0)
    network = entry.build(not args.reduced)
    inputs = batch_of(entry, published=not args.reduced, size=args.batch)
    tensors = {n: x for n, x in inputs.items() if isinstance(x, Tensor)}
    q = quantized(network, inputs, "w8a8")
    low = q.lower("cpu", engine="openvino", precision=args.precision, batch=args.batch)
    flops = {k: args.batch * v for k, v in low.report["lowering"]["flops"].items()}
    found = profile(q, low, list(tensors.values()))
    whole = found.pop("")
    table = Table("kernels", "ms", "share of the step")
    for kind, milliseconds in sorted(found.items(), key=lambda pair: -pair[1]):
        if milliseconds > 0.01 * whole:
            table.add_row(kind, f"{milliseconds:.1f}", f"{milliseconds / whole:.0%}")
    console = Console(width=110)
    console.print(table)
    speeds = rates()
    int8 = sum(found.get(f"{kind}, int8", 0.0) for kind in PRODUCTS)
    least = 1e3 * flops["int8"] / speeds["int8"] / 1e9
    console.print(
        f"a call: {whole:.1f} ms; {flops['total'] / 1e9:.2f} GOP, {flops['int8'] / flops['total']:.1%} of them int8: {int8:.1f} ms "
        f"at {flops['int8'] / int8 / 1e6:.0f} GOP/s; at the product's rate {least:.1f} ms\n"
        f"products of {SIZE} x {SIZE}: " + ", ".join(f"{k} {v:.0f} GOP/s" for k, v in speeds.items()) + "\n"
        f"torch {torch.__version__}, {platform.machine()}, {torch.cpu.get_capabilities()['cpu_name']}, "
        f"{torch.get_num_threads()} threads, {args.precision} between the kernels",
        highlight=False,
    )


if __name__ == "__main__":
    main()
