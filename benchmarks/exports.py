"""Does each exported file compute the same as the quantized network in its own runtime, with int8 kernels?

    python -m benchmarks.exports                      the embedded digits DDPM at W8A8 and W4A8, every format
    python -m benchmarks.exports --recipe w4a8 --format onnxruntime --format aot

Each file is loaded in its own runtime, in a new process that never imports tfmq_fx
(benchmarks/run_exported.py). There the network runs on the inputs that the float pipeline met in 20 DDIM
steps, and draws 8 samples from the same noise. Both are compared with the quantized network itself. Weights
are rounded to nearest: the rounding method does not matter for an export.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tfmq_fx
from benchmarks.run_exported import LOADERS, answers, draw
from tfmq_fx.base.metrics import psnr
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.evaluation.sampling import swapped

COLUMNS = (
    "recipe", "format", "MB", "export s", "int8 layers", "weights", "worst rel. error", "rel. rms error", "PSNR dB",
    "sample CPU s",
)  # fmt: skip
RUNNER = Path(__file__).with_name("run_exported.py")


def inputs_of(pipe: Any, *, samples: int, steps: int) -> dict[str, Any]:
    """Return the input of `run_exported`: states of the float network's own trajectory, and noise."""
    states: list[Tensor] = []
    noise = torch.randn(samples, 1, 16, 16, generator=torch.Generator().manual_seed(1))

    def step(x: Tensor, t: Tensor) -> Tensor:
        states.append(x)
        result: Tensor = pipe.unet(x, t).sample
        return result

    data = {"noise": noise, "steps": steps, "scheduler": dict(pipe.scheduler.config)}
    draw(step, data)
    pipe.scheduler.set_timesteps(steps)
    return {**data, "sample": torch.stack(states), "timestep": pipe.scheduler.timesteps}


def quantized(pipe: Any, recipe: str, *, steps: int) -> tfmq_fx.QuantizedModel:
    nearest = tfmq_fx.Reconstruction(method="nearest")
    settings = dataclasses.replace(tfmq_fx.Recipe.preset(recipe), reconstruction=nearest)
    data = tfmq_fx.CalibrationSet.record(pipe, num_samples=8, num_inference_steps=steps, seed=0)
    return tfmq_fx.quantize(pipe, settings, calibration=data, seed=0)


def errors(got: Tensor, expected: Tensor) -> tuple[str, str]:
    """Return the largest difference / the largest output, and the relative norm of the difference."""
    difference = got - expected
    return (
        f"{difference.abs().amax() / expected.abs().amax():.1e}",
        f"{difference.norm() / expected.norm():.1e}",
    )


def int8_layers(model: tfmq_fx.QuantizedModel, exported: Any) -> str:
    """Return how many of all convolutions and linears run in int8, as told by the runtime or its file."""
    kernels = dict(exported.kernels)
    if exported.format == "openvino":
        found = model.lower("cpu", precision="float32").report["lowering"]["kernels"]
        layers = [k["int8"] for k in found if k["op"] != "scaled_dot_product_attention"]
        kernels = {"int8": sum(layers), "float": len(layers) - sum(layers)}
    if not kernels:
        return f"0 of {len(model.report['layers'])}"  # pt2: quantize/dequantize pairs around float kernels
    return f"{kernels['int8']} of {sum(kernels.values())}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", action="append", help="default: w8a8 and w4a8")
    parser.add_argument("--format", action="append", choices=[*LOADERS], help="default: all")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    data = inputs_of(pipe, samples=given.samples, steps=given.steps)
    table = Table(*COLUMNS)

    def show(*cells: str) -> None:
        table.add_row(*cells)
        print(" | ".join(cells), flush=True)  # each row takes minutes, so print it at once

    for recipe in given.recipe or ["w8a8", "w4a8"]:
        model = quantized(pipe, recipe, steps=given.steps)

        def step(x: Tensor, t: Tensor, model: tfmq_fx.QuantizedModel = model) -> Tensor:
            result: Tensor = model(x, t).sample
            return result

        expected, pictures = answers(step, data), draw(step, data)
        with swapped(pipe, model):  # the pipeline's own loop does the same as that of run_exported
            drawn = pipe(
                batch_size=given.samples, num_inference_steps=given.steps, output_type="np",
                generator=torch.Generator().manual_seed(1),
            ).images  # fmt: skip
        own = (pictures.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1)
        assert (torch.from_numpy(drawn) - own).abs().max() < 1e-5

        # Adding floats in another order flips activations at rounding ties, as another batch size does in q.
        def one_by_one(x: Tensor, t: Tensor, step: Any = step) -> Tensor:
            return torch.cat([step(*row) for row in zip(x.split(1), t.split(1), strict=True)])

        alone, drawn_alone = answers(one_by_one, data), draw(one_by_one, data)
        found = (*errors(alone, expected), f"{psnr(drawn_alone, pictures):.1f}")
        show(recipe, "q, one by one", *[""] * 4, *found)
        for kind in given.format or LOADERS:
            with tempfile.TemporaryDirectory(prefix="tfmq-exports-") as folder:
                root = Path(folder)
                torch.save(data, root / "data.pt")
                suffix = {"pt2": ".pt2", "aot": ".pt2", "openvino": ""}.get(kind, ".onnx")
                exported = model.export(root / f"net{suffix}", format=kind)
                command = [RUNNER, kind, exported.file, root / "data.pt", root / "result.pt"]
                subprocess.run([sys.executable, "-W", "ignore", *map(str, command)], check=True, cwd=folder)
                result = torch.load(root / "result.pt")
            show(
                recipe,
                kind,
                f"{exported.bytes / 1e6:.2f}",
                f"{exported.seconds:.0f}",
                int8_layers(model, exported),
                ", ".join(f"{n} {k}" for k, n in exported.weights.items()),
                *errors(result["answers"], expected),
                f"{psnr(result['pictures'], pictures):.1f}",
                f"{result['seconds']:.1f}",
            )
    Console(width=140).print(table)
    packages = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "onnxruntime", "openvino"))
    cpu = torch.cpu.get_capabilities()["cpu_name"]
    print(
        f"{given.samples} samples, {given.steps} DDIM steps, 1 thread; {packages}; {platform.machine()}, {cpu}"
    )


if __name__ == "__main__":
    main()
