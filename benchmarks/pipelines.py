"""Try every pipeline class of the installed diffusers: float, recorded, quantized, dropped in, saved and loaded.

Each class runs in its own process with a limit of time and memory. Rows are appended to benchmarks/pipelines.jsonl, so
that a run can be cut and go on; classes that have a row are not tried again unless named.

python -m benchmarks.pipelines [--only NAME ...] [--again] [--table]
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import multiprocessing
import re
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.components import arguments, make, with_other_negatives
from benchmarks.networks.pipelines import LENGTH
from tfmq_fx.calibration.pipelines import holders, takes_steps, takes_timestep

ROWS = Path(__file__).with_suffix(".jsonl")
SECONDS, MEMORY = 200, 12 * 2**30
STEPS = 2
COLUMNS = ("built", "float", "records", "quantizes", "drops in", "saves")
NEAREST = dataclasses.replace(
    tfmq_fx.Recipe.preset("w8a8"), reconstruction=tfmq_fx.Reconstruction(method="nearest")
)


def classes() -> dict[str, type]:
    """Return the pipeline classes of the installed diffusers by name, without those that run ONNX files."""
    found = {}
    for name in sorted(dir(diffusers)):
        if "Pipeline" in name and not re.search("Onnx|AutoPipeline|Modular", name):
            try:
                cls = getattr(diffusers, name)
            except Exception:  # needs a package that is not installed
                continue
            if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline):
                found[name] = cls
    found.pop("DiffusionPipeline")
    return found


def attempt(cls: type, row: dict[str, Any]) -> None:
    """Take a class as far as it goes; `row` gets what held. Raises what ends it."""
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        pipe = make(cls, Path(temporary))
        row["built"] = True
        given, reference = _drawn_float(pipe, row)
        if any(x.isnan().any() for x in reference):
            raise LookupError("with these tiny components and arguments, the float sample is NaN")
        row["float"] = True
        names = [n for n, m in pipe.components.items() if isinstance(m, nn.Module) and _denoises(m)]
        if not names:
            raise LookupError("no component is called with a timestep")
        row["networks"] = names
        quantized = {}
        for name in names:
            network = getattr(pipe, name)
            timestep = next(t for t in TIMESTEPS if takes_timestep(network, t))
            steps = STEPS if takes_steps(pipe, by_name=True) else None
            data = tfmq_fx.CalibrationSet.record(
                pipe, num_samples=2, num_inference_steps=steps, component=name, timestep=timestep, **given
            )
            row["records"] = row.get("records", True)
            quantized[name] = tfmq_fx.quantize(network, NEAREST, calibration=data, timestep=timestep)
            row.setdefault("errors", {})[name] = _error(quantized[name], network, data)
        row["quantizes"] = max(row["errors"].values()) < 0.1
        if not row["quantizes"]:
            raise ValueError(f"relative error {max(row['errors'].values()):.3f} at W8A8")
        networks = {name: getattr(pipe, name) for name in quantized}
        for name, q in quantized.items():
            _put(pipe, networks[name], q)
        drawn = _drawn(pipe, given)
        row["drawn"] = _relative(drawn, reference)
        row["drops in"] = True
        for name, q in quantized.items():
            q.save_pretrained(Path(temporary) / name)
            _put(pipe, q, tfmq_fx.load(Path(temporary) / name))
        row["saves"] = _relative(_drawn(pipe, given), drawn) == 0
        if not row["saves"]:
            raise ValueError("the loaded networks draw another sample")


def _drawn_float(pipe: Any, row: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Return arguments with a negative prompt that is shorter than the prompt, or as long if the pipeline needs that, and the sample."""
    given = arguments(pipe)
    shorter, alike = (with_other_negatives(given, length) for length in (LENGTH - 3, LENGTH))
    if _shapes(shorter) != _shapes(alike):
        try:
            found = _drawn(pipe, shorter)
        except Exception:  # the pipeline's own, of any type
            pass
        else:
            row["lengths"] = True
            return shorter, found
    return alike, _drawn(pipe, alike)


def _shapes(given: dict[str, Any]) -> list[Any]:
    return [x.shape for x in pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]


TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "r")


def _denoises(module: nn.Module) -> bool:
    return any(takes_timestep(module, t) for t in TIMESTEPS) and not isinstance(
        module, diffusers.AutoencoderKLLTXVideo
    )


def _put(pipe: Any, old: nn.Module, new: nn.Module) -> None:
    """Put a network in the place of another one, also in the pipelines that a combined one has."""
    for inner, name, _ in [*holders(pipe, old)]:
        setattr(inner, name, new)


def _drawn(pipe: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    takes = inspect.signature(pipe.__call__).parameters
    more: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)} if "generator" in takes else {}
    more |= {"output_type": "np"} if "output_type" in takes else {}
    more |= {"num_inference_steps": STEPS} if "num_inference_steps" in takes else {}
    torch.manual_seed(0)
    with torch.no_grad():
        found = pipe(**{**more, **given})
    values = list(found.values()) if isinstance(found, dict) else found
    leaves = [x for x in pytree.tree_leaves(values) if hasattr(x, "__array__") or isinstance(x, torch.Tensor)]
    return [torch.as_tensor(x).double() for x in leaves]


def _relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def _error(q: nn.Module, network: nn.Module, data: tfmq_fx.CalibrationSet) -> float:
    """Return the largest relative error of an output, on the rows of each timestep together."""
    found = [0.0]
    for rows in map(data.rows, data.groups(len(data), one_timestep=True)):
        a = pytree.tree_leaves(_plain(q(**rows.arguments(slice(None)))))
        b = pytree.tree_leaves(_plain(_called(data.row_wise(network), rows)))
        pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor)]
        found += [float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in pairs]
    return max(found)


def _called(network: nn.Module, rows: tfmq_fx.CalibrationSet) -> Any:
    """Return a network's output for rows of one timestep, which some networks take once for all of them."""
    given = rows.arguments(slice(None), rows_first=True)
    try:
        return network(**given)
    except RuntimeError:
        return network(**{**given, rows.timestep: given[rows.timestep].reshape(-1)[0]})


def _plain(output: Any) -> Any:
    return list(output.values()) if isinstance(output, dict) else output


def _child(name: str, cls: type, file: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    row: dict[str, Any] = {"pipeline": name}
    started = time.process_time()
    try:
        attempt(cls, row)
    except BaseException as error:
        first = str(error).strip().splitlines() or [""]
        row["reason"] = f"{type(error).__name__}: {first[0]}"[:300]
    row["seconds"] = round(time.process_time() - started, 1)
    file.write_text(json.dumps(row))


def try_class(name: str, cls: type) -> dict[str, Any]:
    """Return the row of a class, tried in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "row.json"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(name, cls, file))
        process.start()
        process.join(SECONDS)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        if file.is_file():
            return dict(json.loads(file.read_text()))
        why = f"took more than {SECONDS} s" if late else f"the process ended with {process.exitcode}"
        return {"pipeline": name, "reason": why}


def read() -> dict[str, dict[str, Any]]:
    lines = ROWS.read_text().splitlines() if ROWS.is_file() else []
    return {row["pipeline"]: row for row in map(json.loads, lines)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown, and a line with the counts."""
    lines = ["| pipeline | " + " | ".join(COLUMNS[1:]) + " | |", "|---|" + "---|" * len(COLUMNS)]
    for name, row in sorted(rows.items()):
        marks = " | ".join("yes" if row.get(c) else "" for c in COLUMNS[1:])
        note = row.get("reason") or f"{max(row['errors'].values()):.1%}"
        lines.append(f"| {name.removesuffix('Pipeline')} | {marks} | {note.replace('|', '/')} |")
    counts = ", ".join(f"{c} {sum(bool(r.get(c)) for r in rows.values())}" for c in COLUMNS)
    return "\n".join([*lines, "", f"{len(rows)} classes tried: {counts}."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--again", action="store_true", help="try classes again that have a row")
    parser.add_argument("--failed", action="store_true", help="try classes again whose row has a reason")
    parser.add_argument("--table", action="store_true", help="print the table of the rows, and try nothing")
    parser.add_argument("--match", default="", help="a pattern of the names")
    given = parser.parse_args()
    rows = read()
    if not given.table:
        diffusers.utils.logging.set_verbosity_error()
        torch.set_num_threads(1)
        for name, cls in classes().items():
            again = given.again or name not in rows or (given.failed and "reason" in rows[name])
            if name in given.only or (not given.only and re.search(given.match, name) and again):
                rows[name] = try_class(name, cls)
                print(json.dumps(rows[name]), flush=True)
                ROWS.write_text("".join(json.dumps(r) + "\n" for _, r in sorted(rows.items())))
    print(table(rows) if given.table else table(rows).splitlines()[-1])


if __name__ == "__main__":
    main()
