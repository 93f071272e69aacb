"""What does reconstructing the temporal block of an SD-1.5-size UNet at 4 bits cost, and what does it gain?

Prints seconds, and errors beside those of rounding to nearest.

python -m benchmarks.temporal_scale
"""

from __future__ import annotations

import platform
import time
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table

import tfmq_fx
from benchmarks.networks.zoo import ZOO
from tfmq_fx.base.metrics import cosine_distance
from tfmq_fx.calibration.temporal_rows import run_temporal
from tfmq_fx.passes import extract_temporal, find_temporal
from tfmq_fx.passes.quantize.state import state_of, temporal_of

STEPS = 50


def main() -> None:
    torch.manual_seed(0)
    entry = next(e for e in ZOO if e.name == "sd-1.5")
    network = entry.build(True)  # torch's own initialisation: random weights in real memory
    inputs = entry.inputs(True)
    gm = tfmq_fx.capture(network, inputs)
    timesteps = torch.linspace(999, 1, STEPS).long()
    rows = {"timestep": timesteps}
    with torch.no_grad():
        expected = run_temporal(extract_temporal(gm, find_temporal(gm)), rows)
    data = tfmq_fx.CalibrationSet.from_tensors(
        {
            n: x[:1].repeat(STEPS, *[1] * (x.dim() - 1))
            for n, x in inputs.items()
            if isinstance(x, torch.Tensor)
        }
        | rows
    )
    # Quantize only the block, to 4 bits; everything else stays in float.
    rules = (
        tfmq_fx.Rule(pattern="time_embedding*"),
        tfmq_fx.Rule(pattern="*time_emb_proj*"),
        tfmq_fx.Rule(pattern="*", weight_bits=16, activation_bits=16),
    )
    table = Table("method", "seconds", "MSE", "cosine distance, mean", "worst")
    for method in ("nearest", "adaround", "gptq"):
        settings = tfmq_fx.Reconstruction(method="nearest", temporal_method=method, temporal_iterations=200)
        prepared = tfmq_fx.prepare(
            gm, tfmq_fx.Recipe(rules=rules, reconstruction=settings), timesteps=timesteps
        )
        tfmq_fx.calibrate(prepared, data)
        started = time.perf_counter()
        tfmq_fx.reconstruct(prepared, data)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            features = run_temporal(extract_temporal(prepared, temporal_of(prepared)), rows)
        distance = cosine_distance(features, expected)
        error = sum((f - e).square().mean() for f, e in zip(features, expected, strict=True)) / len(expected)
        name = f"{method}, 200 iterations" if method == "adaround" else method
        table.add_row(
            name, f"{seconds:.1f}", f"{error:.2e}", f"{distance.mean():.2e}", f"{distance.max():.2e}"
        )
    bits = Counter(layer.weight_bits for layer in state_of(prepared).plan.layers if layer.temporal)
    Console(width=110).print(table)
    print(
        f"{len(expected)} features, layers: {', '.join(f'{n} at {b} bit' for b, n in sorted(bits.items()))}, {STEPS} timesteps; "
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
