"""How much of a trained network from outside does quantization keep, how long does it take, and how fast is it lowered?

    python -m benchmarks.terrain                     all rows, one thread (minutes to an hour)
    python -m benchmarks.terrain --rows bf16 w8a8    some of them
    python -m benchmarks.terrain --picture docs/images/terrain.png --rows w8a8 w4a8

The network is that of benchmarks/networks/terrain.py, trained and published by others; its wheel is downloaded
by name. PSNR is to the float network on 32 held rows, 4 at each of 8 noise levels, in dB, of heights in -1..1.
All methods calibrate on the same 32 other rows. CPU seconds are those of quantizing. Times are medians of one
call with batch 1, all contenders in turn, in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tfmq_fx
from benchmarks.networks.terrain import (
    NAMES,
    Rows,
    Terrain,
    onnx_file,
    outputs,
    psnr_by_sigma,
    rows,
)
from benchmarks.recipes import named

Call = Callable[..., Tensor]
FLOAT = "float, torch, float32"  # what times are compared with
ROWS = ("bf16", "onnxruntime", "nncf", "w8a8 plain", "w8a8", "w4a8")
MORE = (
    "w8a8 nearest", "w8a8 float8", "w4a8 float8", "w8a16", "w8a16 unchosen", "w4a16", "w3a8", "w3a8 unchosen", "w4a4",
    "w4a4 unchosen", "w8a8 corrected", "w4a8 corrected", "w3a8 corrected", "w4a4 corrected",
)  # fmt: skip


def bf16(network: nn.Module) -> Call:
    def call(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = network(*given)
            return y

    return call


def arrays(given: Iterable[Tensor]) -> dict[str, Any]:
    """Return the inputs by name, as onnxruntime takes them."""
    return dict(zip(NAMES, (x.numpy() for x in given), strict=True))


def onnx_session(file: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options)

    def call(*given: Tensor) -> Tensor:
        (y,) = session.run(None, arrays(given))
        return torch.from_numpy(y)

    return call


def onnxruntime_int8(data: Rows, folder: Path) -> Call:
    """Return onnxruntime's static quantization: convolutions and products, per channel, minimum and maximum."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[Any] = zip(*(x.split(1) for x in data), strict=True)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.left, None)
            return None if row is None else arrays(row)

    quant_pre_process(str(onnx_file()), str(folder / "ready.onnx"), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(folder / "ready.onnx"),
        str(folder / "int8.onnx"),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
    )
    return onnx_session(folder / "int8.onnx")


def precisions() -> tuple[str, ...]:
    """Return what OpenVINO may compute in between int8 kernels here: bfloat16 where the CPU has it."""
    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("float32", "bfloat16") if "BF16" in can else ("float32",)


def openvino_call(model: Any, precision: str = "float32") -> Call:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda *given: torch.from_numpy(compiled([x.numpy() for x in given])[0].copy())


def nncf_int8(data: Rows) -> Any:
    """Return NNCF's default post-training quantization, a model of OpenVINO's."""
    import nncf
    import openvino

    samples = [[x.numpy() for x in row] for row in zip(*(x.split(1) for x in data), strict=True)]
    model = openvino.Core().read_model(onnx_file())
    return nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples))


def contender(name: str, network: nn.Module, given: Rows, folder: Path) -> Any:
    """Return what computes a row of the table, or NNCF's model. given: the calibration rows.

    Raises ImportError for a missing package.
    """
    if name == "bf16":
        return bf16(network)
    if name == "onnxruntime":
        return onnxruntime_int8(given, folder)
    if name == "nncf":
        return nncf_int8(given)
    data = tfmq_fx.CalibrationSet.from_tensors(dict(zip(NAMES, given, strict=True)), timestep="sigma")
    return tfmq_fx.quantize(network, named(name), calibration=data, timestep="sigma", seed=0)


@dataclasses.dataclass
class Row:
    name: str
    psnr: list[float]
    cpu_seconds: float | None = None
    note: str = ""
    layers: list[dict[str, Any]] = dataclasses.field(default_factory=list, repr=False)


def lowered(name: str, made: Any) -> Iterator[tuple[str, Call]]:
    """Yield what is timed of a row, by its name in the table."""
    if isinstance(made, tfmq_fx.QuantizedModel):
        for engine, precision in itertools.product(("openvino", "torch"), precisions()):
            step = made.lower("cpu", engine=engine, precision=precision, batch=1)
            yield f"{name}, {engine}, {precision}", step
    elif name == "nncf":
        for precision in precisions():
            yield f"nncf, {precision}", openvino_call(made, precision)
    elif name == "onnxruntime":
        yield name, made


def lowered_float(network: nn.Module) -> Iterator[tuple[str, Call]]:
    """Yield what the float network runs in, by its name in the table."""
    import openvino

    yield FLOAT, network
    yield "float, onnxruntime", onnx_session(onnx_file())
    for precision in precisions():
        yield (
            f"float, openvino, {precision}",
            openvino_call(openvino.Core().read_model(onnx_file()), precision),
        )


def time_all(calls: dict[str, Call], example: Rows, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each call. Every round calls all of them once."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            with torch.no_grad():
                call(*example)
            if i:  # the first one compiles
                found[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in found.items()}


def draw(picture: Path, clean: dict[str, Tensor]) -> None:
    """Write a picture of terrains: a row of four for each network, from the same noise at the highest level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(clean), 4, figsize=(8, 2.1 * len(clean)), squeeze=False)
    for row, (name, heights) in zip(axes, clean.items(), strict=True):
        for axis, height in zip(row, heights, strict=True):
            axis.imshow(height[0], cmap="terrain", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=(*ROWS, *MORE), default=list(ROWS))
    parser.add_argument("--count", type=int, default=4, help="calibration rows of each noise level")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0, help="time lowered networks in so many rounds")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--layers", type=int, default=0, help="show so many layers, of most of what is lost")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = Terrain().eval()
    held, given = rows(network, 4, seed=2), rows(network, args.count, seed=1)
    reference = outputs(network, held)
    found, clean, calls = [], {"float": reference[:4]}, {}
    with tempfile.TemporaryDirectory() as folder:
        if args.rounds:
            calls = dict(lowered_float(network))
        for name in args.rows:
            started = time.process_time()
            try:
                made = contender(name, network, given, Path(folder))
            except ImportError as error:
                found.append(Row(name, [], note=f"not installed: {error.name}"))
                continue
            seconds = time.process_time() - started
            y = outputs(openvino_call(made) if name == "nncf" else made, held)
            clean[name] = y[:4]
            found.append(Row(name, psnr_by_sigma(y, reference), seconds))
            if isinstance(made, tfmq_fx.QuantizedModel):
                found[-1].note = f"{made.report['sizes']['quantized_bytes'] / 1e6:.2f} MB"
                if report := made.report["choices"]:
                    found[-1].note += f", {100 * report['float_flops']:.1f}% of FLOPs in float"
                    found[-1].layers = report["layers"]
            for label, step in lowered(name, made) if args.rounds else ():
                calls[label] = step
                if step is not made:
                    found.append(Row(label, psnr_by_sigma(outputs(step, held, 1), reference)))
            Console(stderr=True).print(found[-1], highlight=False)
        times = time_all(calls, tuple(x[:1] for x in held), args.rounds) if args.rounds else {}  # type: ignore[arg-type]
    show(found, times)
    if args.layers:
        show_layers(found, args.layers)
    if args.picture:
        draw(args.picture, clean)


def show(found: list[Row], times: dict[str, float]) -> None:
    console = Console(width=120)
    table = Table("network", "mean of 8, dB", "at sigma 80", "lowest", "CPU s", "")
    for row in found:
        mean = f"{statistics.mean(row.psnr):.1f}" if row.psnr else ""
        at = (f"{row.psnr[0]:.1f}", f"{min(row.psnr):.1f}") if row.psnr else ("", "")
        table.add_row(
            row.name, mean, *at, "" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f}", row.note
        )
    console.print(table)
    if times:
        table = Table("one call, batch 1", "ms", "times as fast as float, torch")
        for name, ms in times.items():
            table.add_row(name, f"{ms:.0f}", f"{times[FLOAT] / ms:.2f}")
        console.print(table)
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torchao", "onnxruntime", "openvino")
    )
    console.print(
        f"{torch.cpu.get_capabilities()['cpu_name']}, {torch.get_num_threads()} thread(s), {versions}"
    )


def show_layers(found: list[Row], count: int) -> None:
    """Print the layers that lose most: their shares of the error left, as the choice expects it, in percent."""
    table = Table("network", "layer", "its input", "its weight", "chosen for it")
    for row in found:
        for layer in row.layers[:count]:
            chosen = {k: v for k, v in layer.items() if k not in ("name", "input", "weight")}
            shares = (f"{100 * layer[key]:.1f}" for key in ("input", "weight"))
            table.add_row(row.name, layer["name"], *shares, ", ".join(f"{k} {v}" for k, v in chosen.items()))
        if left := row.layers[count:]:
            rest = (f"{100 * sum(x[key] for x in left):.1f}" for key in ("input", "weight"))
            table.add_row(row.name, f"{len(left)} others", *rest)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
