"""Does the measured choice of reconstructing or caching beat both pure choices, at every schedule length?

    python -m benchmarks.maintenance

Quantizes the embedded digits model at W4A8 (`--recipe`), with its temporal block reconstructed and the rest
rounded to nearest. For each number of timesteps T of the DDIM schedule, compares the reconstructed block,
cached features, and the measured choice: without a budget, with the bytes of either pure choice as its
budget, and with their mean.

bytes             of everything that produces the features
cosine distance   of the features to float, mean over features and timesteps
effect            sum |output - float|^2 / sum |float|^2 with these features in the otherwise float network, on
                  noisy digits of the data set at timesteps of the schedule; not the rows of the choice
ms                of the block for one sample, eager, one thread, median of 21
beaten by         the pure choices that are no worse in bytes and in either of the errors, and better in one
                  of the two
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
from typing import Any

import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule

import tfmq_fx
from benchmarks.digits import digits
from tfmq_fx.base.metrics import cosine_distance
from tfmq_fx.calibration.temporal_rows import run_temporal
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.graph.state import set_state
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.maintenance.tables import feature_tables
from tfmq_fx.passes.quantize.observed import without_observers
from tfmq_fx.passes.quantize.state import state_of, temporal_of
from tfmq_fx.passes.temporal.partition_temporal import partition_temporal
from tfmq_fx.recipe import Reconstruction

LENGTHS = (10, 20, 50, 100, 250, 1000)
ROWS = 64


def noisy_digits(scheduler: Any, timesteps: Tensor, *, seed: int) -> tfmq_fx.CalibrationSet:
    """Return ROWS noisy digits, as the network meets them, at timesteps spread over the schedule."""
    generator = torch.Generator().manual_seed(seed)
    images = digits()[0]
    x = images[torch.randint(len(images), (ROWS,), generator=generator)]
    t = timesteps[torch.linspace(0, len(timesteps) - 1, ROWS).round().long()]
    noise = torch.randn(x.shape, generator=generator)
    return tfmq_fx.CalibrationSet.from_tensors({"sample": scheduler.add_noise(x, noise, t), "timestep": t})


def reconstructed(gm: GraphModule, recipe: tfmq_fx.Recipe, timesteps: Tensor, data: Any) -> GraphModule:
    prepared = tfmq_fx.prepare(gm, recipe, timesteps=timesteps)
    return tfmq_fx.reconstruct(tfmq_fx.calibrate(prepared, data), data, seed=0)


@torch.no_grad()
def errors(gm: GraphModule, maintained: GraphModule, held_out: Any) -> dict[str, float]:
    """Return the cosine distance to float of a maintained graph's features, and their effect on the output.

    maintained: a maintained copy of the reconstructed graph `gm`.
    """
    block = tfmq_fx.convert(maintained).get_submodule("temporal_block")
    assert isinstance(block, GraphModule)
    reference = list(feature_tables(gm).values())
    features = run_temporal(block, {"timestep": state_of(gm).timesteps})
    network = without_observers(gm)
    partition_temporal(network, temporal=temporal_of(network))
    inputs = held_out.tensors["sample"], held_out.tensors["timestep"]
    exact = network(*inputs)[0].double()
    network.set_submodule("temporal_block", block)
    error = network(*inputs)[0].double() - exact
    return {
        "distance": cosine_distance(features, reference).mean().item(),
        "effect": (error.square().sum() / exact.square().sum()).item(),
    }


def measure(gm: GraphModule, data: Any, held_out: Any, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return the table rows of a choice and of the reconstructed block beside it. `gm` is not changed."""
    copy = fresh(gm)
    state = state_of(gm)
    set_state(copy, dataclasses.replace(state, recipe=dataclasses.replace(state.recipe, **settings)))
    maintained = state_of(maintain(copy, data)).maintenance
    assert maintained is not None
    found = dataclasses.asdict(maintained)
    cached = sum(f["chosen"] == "cache" for f in found["features"])
    rows = {}
    for name, graph, count in (("reconstruct", gm, 0), ("chosen", copy, cached)):
        rows[name] = {
            "bytes": found["bytes"][name],
            "ms": 1e3 * found["seconds_per_call"][name],
            "cached": f"{count} of {len(found['features'])}",
            "decisions": found["features"],
            **errors(gm, graph, held_out),
        }
    return rows


def beaten(row: dict[str, Any], others: dict[str, dict[str, Any]]) -> str:
    """Name the other rows that are no worse in bytes and in either error, and better in one of the two."""
    found = []
    for name, other in others.items():
        for error in ("distance", "effect"):
            mine, theirs = (row["bytes"], row[error]), (other["bytes"], other[error])
            if theirs[0] <= mine[0] and theirs[1] <= mine[1] and theirs != mine:
                found.append(f"{name} ({error})")
    return ", ".join(found) or "none"


@torch.no_grad()
def segment(gm: GraphModule) -> str:
    """Describe the effect of a table for only the worst tenth of the timesteps, beside the weights."""
    reference = list(feature_tables(gm).values())
    block = tfmq_fx.convert(fresh(gm)).get_submodule("temporal_block")
    assert isinstance(block, GraphModule)
    d_FT = cosine_distance(run_temporal(block, {"timestep": state_of(gm).timesteps}), reference)
    worst = d_FT.sort(dim=1, descending=True).values[:, : max(1, d_FT.shape[1] // 10)].sum(1)
    share = (worst.sum() / d_FT.sum()).item()
    whole = (d_FT.sum(1).sort(descending=True).values[: max(1, len(d_FT) // 10)].sum() / d_FT.sum()).item()
    added = max(1, d_FT.shape[1] // 10) * sum(x[0].numel() for x in reference) * 2
    return f"{100 * share:.0f}% of the distance for {added} bytes more; the worst tenth of the features holds {100 * whole:.0f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timesteps", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--bound", type=float, default=tfmq_fx.Recipe().maintain_bound)
    parser.add_argument(
        "--decisions", action="store_true", help="also print every decision of the unbounded choice"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    unet = embedded_pipeline().unet.eval()
    scheduler = DDIMScheduler.from_config(embedded_pipeline().scheduler.config)
    recipe = dataclasses.replace(
        tfmq_fx.Recipe.preset(args.recipe),
        reconstruction=Reconstruction(method="nearest", temporal_method="gptq"),
        maintain_bound=args.bound,
    )
    out = Console(width=130)
    shown = Table(
        "T",
        "maintenance",
        "cached",
        "bytes",
        "saved",
        "cosine distance",
        "effect on output",
        "ms a call",
        "beaten by",
    )
    segments, gm = [], None
    for length in args.timesteps:
        scheduler.set_timesteps(length)
        timesteps = scheduler.timesteps
        data, held_out = (noisy_digits(scheduler, timesteps, seed=s) for s in (0, 1))
        if gm is None:
            gm = tfmq_fx.capture(unet, {**data.arguments(slice(0, 2)), "return_dict": False})
        prepared = reconstructed(gm, recipe, timesteps, data)
        cache = measure(prepared, data, held_out, maintain="cache")
        pure = {"reconstruct": cache["reconstruct"], "cache float16": cache["chosen"]}
        int8 = measure(prepared, data, held_out, maintain="cache", cache_type="int8")
        rows = {**pure, "cache int8": int8["chosen"]}
        rows["auto"] = measure(prepared, data, held_out, maintain="auto")["chosen"]
        budgets = {f"auto, {name}'s bytes": row["bytes"] for name, row in pure.items()}
        budgets["auto, half-way"] = sum(budgets.values()) // 2
        for name, budget in budgets.items():
            bounds = {"maintain": "auto", "maintain_bytes": budget}
            rows[name] = measure(prepared, data, held_out, **bounds)["chosen"]
        for name, row in rows.items():
            shown.add_row(
                str(length) if name == "reconstruct" else "",
                name,
                row["cached"],
                str(row["bytes"]),
                str(pure["reconstruct"]["bytes"] - row["bytes"]),
                f"{row['distance']:.1e}",
                f"{row['effect']:.1e}",
                f"{row['ms']:.2f}",
                beaten(row, pure) if name.startswith("auto") else "",
            )
        shown.add_section()
        segments.append(
            f"T = {length}: a table for the worst tenth of the timesteps would remove {segment(prepared)}"
        )
        if args.decisions:
            for d in rows["auto"]["decisions"]:
                out.print(f"T = {length} {d['path']}: {d['chosen']}, {d['why']}", highlight=False)
    out.print(shown)
    for line in segments:
        out.print(line, highlight=False)
    print(
        f"digits, {args.recipe}, bound {args.bound:g}; torch {torch.__version__}, {platform.machine()}, 1 thread"
    )


if __name__ == "__main__":
    main()
