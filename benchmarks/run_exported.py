"""Run an exported network in its own runtime, in a process that never imports tfmq_fx.

    python benchmarks/run_exported.py FORMAT FILE DATA RESULT

DATA is a file of torch.save. It holds the calls to run: "sample" (K, N, C, H, W) and "timestep" (K,); and
what sampling needs: "noise" (N, C, H, W), "scheduler" (the configuration of a DDIM scheduler) and "steps".
RESULT receives the outputs, the samples and the CPU seconds of sampling. `benchmarks/exports.py` writes DATA
and reads RESULT.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]  # (N, C, H, W) and timesteps (N,) -> (N, C, H, W)


def load_pt2(file: str) -> Step:
    import torch.ao.quantization.fx._decomposed  # registers torch's own quantize and dequantize operators

    module = torch.export.load(file).module()
    return lambda x, t: module(sample=x, timestep=t)[0]


def load_aot(file: str) -> Step:
    from torch._inductor import aoti_load_package

    package = aoti_load_package(file)
    return lambda x, t: package(sample=x, timestep=t)[0]


def load_onnx(file: str) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x, t: torch.from_numpy(session.run(None, {"sample": x.numpy(), "timestep": t.numpy()})[0])


def load_openvino(folder: str) -> Step:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    network = openvino.Core().compile_model(Path(folder) / "network.xml", "CPU", settings)
    return lambda x, t: torch.from_numpy(network({"sample": x.numpy(), "timestep": t.numpy()})[0])


LOADERS = {
    "pt2": load_pt2, "aot": load_aot, "onnx": load_onnx, "onnxruntime": load_onnx, "openvino": load_openvino,
}  # fmt: skip


@torch.no_grad()
def answers(step: Step, data: dict[str, Any]) -> Tensor:
    """Return the network's outputs for the K batches, (K, N, C, H, W)."""
    return torch.stack(
        [
            step(x, t.expand(len(x)).contiguous())
            for x, t in zip(data["sample"], data["timestep"], strict=True)
        ]
    )


@torch.no_grad()
def draw(step: Step, data: dict[str, Any]) -> Tensor:
    """Return images (N, C, H, W) from the given noise, by DDIM with eta 0."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(data["scheduler"])
    scheduler.set_timesteps(data["steps"])
    x: Tensor = data["noise"]
    for t in scheduler.timesteps:
        x = scheduler.step(step(x, t.expand(len(x)).contiguous()), t, x).prev_sample
    return x


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kind, file, data_file, result_file = sys.argv[1:]
    data = torch.load(data_file)
    step = LOADERS[kind](file)
    found = answers(step, data)
    start = time.process_time()
    pictures = draw(step, data)
    seconds = time.process_time() - start
    assert not any(name.partition(".")[0] == "tfmq_fx" for name in sys.modules)
    torch.save({"answers": found.clone(), "pictures": pictures.clone(), "seconds": seconds}, result_file)


if __name__ == "__main__":
    main()
