"""The command line: tfmq inspect | quantize | sample | evaluate | report | export."""

from __future__ import annotations

import dataclasses
import inspect as inspect_module
import json
import logging as stdlib_logging
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tfmq_fx.base.errors import TFMQError, first_line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize diffusion models.",
)
out = Console(soft_wrap=True)

_UsageError: Any = typer.BadParameter.__base__  # of click, or of the click that a newer typer has inside

Model = Annotated[
    str | None,
    typer.Option("--model", help="A diffusers pipeline folder or hub id. Default: the embedded digits DDPM."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="A diffusers scheduler class, e.g. DDIMScheduler. Default: the pipeline's own."),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", help="w8a8, w4a8, w8a16, w4a16, w4a4, w3a8, w2a8, or a JSON file of Recipe's fields."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Seed = Annotated[int, typer.Option(help="Seed of noise and of calibration.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option("--argument", help="A pipeline argument as NAME=JSON, e.g. class_labels=[1,2]."),
]
Folder = Annotated[Path, typer.Argument(help="A folder written by `tfmq quantize`.")]


def load_pipeline(model: str | None, scheduler: str | None = None) -> Any:
    """The pipeline of a local folder or hub id, in eval mode. Raises TFMQError for anything else."""
    import diffusers
    from diffusers.utils import is_transformers_available, logging

    from tfmq_fx.demo import embedded_pipeline

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        if is_transformers_available():
            from transformers.utils import logging as of_transformers

            of_transformers.disable_progress_bar()
            of_transformers.set_verbosity_error()  # or it says which image processors it lacks
    if model is None:
        pipe = embedded_pipeline()
    else:
        folder = Path(model)
        if folder.exists() and not (folder / "model_index.json").is_file():
            raise TFMQError(f"{model}: not a diffusers pipeline folder (no model_index.json).")
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(model)
        except Exception as error:  # diffusers, safetensors and the hub client raise many types
            raise TFMQError(
                f"{model}: diffusers cannot load it ({type(error).__name__}: {first_line(error)})"
            ) from error
    if scheduler is not None:
        cls: Any = getattr(diffusers, scheduler, None)
        known = inspect_module.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)
        if not known:
            raise TFMQError(f"--scheduler: diffusers has no scheduler {scheduler!r}.")
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    return pipe


def _recipe(text: str) -> Any:
    from tfmq_fx.recipe import Recipe

    return Recipe.read(Path(text)) if text.endswith(".json") else Recipe.preset(text)


def _named_json(option: str, values: list[str] | None) -> dict[str, Any]:
    """NAME=JSON texts as a dict."""
    found = {}
    for text in values or []:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise TFMQError(
                f"{option} {text!r}: use NAME=JSON; strings take quotes, e.g. prompt='\"a cat\"'."
            ) from error
    return found


def _pipeline_arguments(values: list[str] | None) -> dict[str, Any]:
    """--argument; names that the commands have options for, or give themselves, are refused."""
    from tfmq_fx.calibration.data import CalibrationSet

    found = _named_json("--argument", values)
    ours = {*inspect_module.signature(CalibrationSet.record).parameters, "generator", "output_type"}
    if wrong := [name for name in found if name in ours]:
        raise TFMQError(f"--argument {wrong[0]}: the command gives that itself; see its --help.")
    return found


@app.command()
def inspect(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A pipeline folder or hub id, or the folder of a network. Default: the embedded digits DDPM.",
        ),
    ] = None,
    recipe: RecipeOption = "w4a8",
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="For a network's folder: an input as NAME=SHAPE[:DTYPE], e.g. sample=2,4,64,64 or timestep=2:int64.",
        ),
    ] = None,
    weights: Annotated[
        bool, typer.Option(help="--no-weights reads config.json alone: any size, in little memory.")
    ] = True,
    timestep: Annotated[
        str | None, typer.Option(help="The timestep's name. Default: `timestep`, or the one that can be it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    argument: Arguments = None,
) -> None:
    """Show the temporal block found by dataflow, and what a recipe would do to every layer."""

    from tfmq_fx.calibration.data import CalibrationSet
    from tfmq_fx.calibration.pipelines import denoiser
    from tfmq_fx.inspection import describe, example_inputs, load_network

    chosen = _recipe(recipe)
    if model is not None and (Path(model) / "config.json").is_file():
        network = load_network(Path(model), weights=weights)
        example = example_inputs(network, inputs or [])
    elif inputs or not weights:
        raise TFMQError(
            f"--input, --no-weights: are for the folder of a network with a config.json, not {model}."
        )
    else:
        pipe = load_pipeline(model)
        network = denoiser(pipe, timestep=timestep or "timestep")
        arguments = _pipeline_arguments(argument)
        data = CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2, **arguments)
        example = data.arguments(slice(0, 2))
    found = describe(network, example, chosen, timestep=timestep)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    block, seconds = found["temporal_block"], found["seconds"]
    out.print(
        f"{found['network']}: {found['parameters'] / 1e6:.2f} M parameters, {found['nodes']} nodes; "
        f"captured in {seconds['capture']:.1f} s, block found in {seconds['find'] * 1e3:.0f} ms"
    )
    out.print(
        f"temporal block: {block['nodes']} nodes, a function of {', '.join(block['keys'])}; {len(block['features'])} features:"
    )
    for feature in block["features"]:
        more = [k for k in feature["keys"] if k != block["keys"][0]]
        out.print(f"  {feature['path']}" + (f"  (with {', '.join(more)})" if more else ""))
    table = Table("layers", "op", "weight bits", "activation bits", "temporal")
    groups: dict[tuple[Any, ...], int] = {}
    for layer in found["layers"]:
        key = (
            layer["op"],
            layer["weight_bits"],
            layer["activation_bits"],
            "yes" if layer["temporal"] else "",
        )
        groups[key] = groups.get(key, 0) + 1
    for key, count in sorted(groups.items(), key=str):
        table.add_row(str(count), *map(str, key))
    out.print(table)
    for kept in found["float"]:
        out.print(f"float: {kept['name']} ({kept['reason']})")


@app.command()
def quantize(
    output: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or an earlier artefact.")],
    model: Model = None,
    recipe: RecipeOption = "w4a8",
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Calibration trajectories. Default: 64, or the preset's.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps. Default: 50, or the preset's.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="The papers' settings: ddim-cifar10, ldm-bedrooms, ldm-churches, ldm-celebahq, ldm-ffhq, ldm-imagenet, sd14-coco, sdxl."
        ),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="A COCO captions JSON: one prompt of it for each trajectory.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="A folder that keeps recorded trajectories.")] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Learn the rounding (adaround), so many iterations per block; 0: round to nearest. Default: as the recipe says.",
        ),
    ] = None,
    tune_iterations: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Then tune all blocks together, so many iterations; 0: leave that out. Default: as the recipe says.",
        ),
    ] = None,
    seed: Seed = 0,
    scheduler: Scheduler = None,
    argument: Arguments = None,
    finite: Annotated[
        list[str] | None,
        typer.Option(help="An input with finitely many values, as NAME=JSON, e.g. class_labels=[0,1,2]."),
    ] = None,
    maintain: Annotated[
        str | None,
        typer.Option(
            help="What gives the temporal features: reconstruct (the quantized block), cache (tables), auto. Default: the recipe's."
        ),
    ] = None,
    unseen: Annotated[
        str | None,
        typer.Option(
            help="What a timestep outside the table takes: nearest (its neighbour's scales), float (the float temporal block, kept "
            "beside), error. Default: the recipe's."
        ),
    ] = None,
    max_megabytes: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="For the layers' weights: 4 or 8 bits for each, by its measured effect on the output. Default: the recipe's bits.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Refuse what would stay in float or be keyed more coarsely than asked for.")
    ] = False,
) -> None:
    """Calibrate on the pipeline's own trajectories, reconstruct, convert, and write the artefact.

    Under `torchrun --nproc-per-node=N -m tfmq_fx.cli quantize ..` the N processes share the work.
    """
    from tfmq_fx.artefact.saving import check_output_folder
    from tfmq_fx.base.parallel import joined
    from tfmq_fx.bit_widths import mixed_precision
    from tfmq_fx.calibration.pipelines import coco_captions
    from tfmq_fx.calibration.presets import CalibrationPreset
    from tfmq_fx.pipeline import quantize as run

    chosen = _recipe(recipe)
    settings = chosen.reconstruction
    if iterations == 0:
        settings = dataclasses.replace(settings, method="nearest")
    elif iterations is not None:
        method = settings.method if "adaround" in settings.method else "adaround"
        settings = dataclasses.replace(settings, method=method, iterations=iterations)
    if tune_iterations is not None:
        settings = dataclasses.replace(settings, tune_iterations=tune_iterations)
    chosen = dataclasses.replace(chosen, reconstruction=settings)
    changes: dict[str, Any] = {"maintain": maintain, "unseen": unseen}
    chosen = dataclasses.replace(chosen, **{n: x for n, x in changes.items() if x is not None})
    preset = CalibrationPreset.named(calibration) if calibration is not None else CalibrationPreset()
    preset = dataclasses.replace(
        preset,
        num_samples=num_samples or preset.num_samples,
        num_inference_steps=steps or preset.num_inference_steps,
    )
    with joined() as ranks:
        check_output_folder(output)  # before minutes of work, not after
        pipe = load_pipeline(model, scheduler)
        arguments, tables = _pipeline_arguments(argument), _named_json("--finite", finite)
        if captions is not None:
            arguments["prompt"] = coco_captions(captions, num=preset.num_samples, seed=seed)
        data = preset.record(
            pipe,
            batch_size=max(1, min(64, -(-preset.num_samples // ranks.size))),
            seed=seed,
            cache=cache,
            **arguments,
        )
        if max_megabytes is not None:
            chosen = mixed_precision(
                pipe, chosen, calibration=data, max_bytes=max_megabytes * 1e6, finite=tables, seed=seed
            )
        # Beside the output, so that the same command finds it after an interruption; gone when the output is whole.
        state = output.absolute().with_name(f".{output.name}.state")
        quantized = run(pipe, chosen, calibration=data, finite=tables, seed=seed, strict=strict, state=state)
        if ranks.rank != 0:
            return
    quantized.record_command(shlex.join(["tfmq", *sys.argv[1:]]))
    quantized.save_pretrained(output)
    shutil.rmtree(state, ignore_errors=True)
    report = quantized.report
    sizes = report["sizes"]
    distances = [
        e["temporal_cosine_distance"] for e in report["errors_by_timestep"] if "temporal_cosine_distance" in e
    ]
    distance = sum(distances) / max(1, len(distances))
    out.print(
        f"{output}: {recipe}, {len(report['layers'])} layers, {report['temporal_block']['features']} temporal features at "
        f"{report['temporal_block']['timesteps']} timesteps (mean cosine distance {distance:.1e})"
    )
    out.print(
        f"{sizes['float_bytes'] / 1e6:.2f} MB float -> {sizes['quantized_bytes'] / 1e6:.2f} MB ({sizes['ratio']:.3f}); report.json lists what stayed float and why"
    )
    if (kept := report["maintenance"]).get("features"):
        cached = sum(f["chosen"] == "cache" for f in kept["features"])
        out.print(
            f"maintenance: {cached} of {len(kept['features'])} temporal features cached; {kept['bytes']['chosen'] / 1e3:.1f} kB for "
            f"them all, reconstructed {kept['bytes']['reconstruct'] / 1e3:.1f} kB"
        )
    notes: dict[str, int] = {}
    for note in report["notes"]:
        notes[note["reason"]] = notes.get(note["reason"], 0) + 1
    for reason, count in notes.items():
        out.print(f"note: {reason}" + (f" ({count})" if count > 1 else ""))
    out.print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in report["seconds"].items()))


@app.command()
def sample(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
    model: Model = None,
    num_samples: Annotated[int, typer.Option(min=1)] = 64,
    steps: Steps = 50,
    seed: Seed = 0,
    scheduler: Scheduler = None,
    argument: Arguments = None,
) -> None:
    """Write a PNG: float beside quantized, from the same noise."""
    from tfmq_fx.base.metrics import psnr
    from tfmq_fx.evaluation.sampling import save_grid
    from tfmq_fx.model import load
    from tfmq_fx.report import require_packages

    require_packages("sample")
    quantized = load(folder)
    images = _both(load_pipeline(model, scheduler), quantized, num_samples, steps, seed, argument)
    save_grid([("float", images[0]), (folder.name, images[1])], output)
    out.print(
        f"{output}: {num_samples} samples, {steps} steps, PSNR {psnr(images[1], images[0]):.1f} dB over all pixels"
    )


@app.command()
def evaluate(
    folder: Folder,
    model: Model = None,
    num_samples: Annotated[int, typer.Option(min=1)] = 256,
    steps: Steps = 50,
    seed: Seed = 1,
    scheduler: Scheduler = None,
    argument: Arguments = None,
) -> None:
    """Compare with the float pipeline from the same noise: PSNR, and the report's errors by timestep."""
    from tfmq_fx.base.metrics import psnr, psnr_by_image
    from tfmq_fx.model import load

    quantized = load(folder)
    images = _both(load_pipeline(model, scheduler), quantized, num_samples, steps, seed, argument)
    by_image = psnr_by_image(images[1], images[0])
    table = Table("measure", "value")
    table.add_row(
        "PSNR to float, mean of images",
        f"{by_image.mean():.2f} dB (range 2, {num_samples} samples, {steps} steps)",
    )
    table.add_row("PSNR to float, all pixels pooled", f"{psnr(images[1], images[0]):.2f} dB")
    table.add_row("worst 1% of images below", f"{by_image.quantile(0.01):.2f} dB")
    errors = quantized.report["errors_by_timestep"]
    for name in ("output_relative_mse", "temporal_cosine_distance", "temporal_cosine_distance_worst"):
        values = [e[name] for e in errors if name in e]
        if values:
            table.add_row(
                f"{name} at calibration", f"mean {sum(values) / len(values):.2e}, worst {max(values):.2e}"
            )
    table.add_row("unseen timesteps", str(len(quantized.report["unseen_timesteps"])))
    out.print(table)


@app.command()
def report(
    folder: Folder,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: the artefact's name with -report.")
    ] = None,
    model: Model = None,
    num_samples: Annotated[int, typer.Option(min=1)] = 16,
    steps: Steps = 50,
    seed: Seed = 1,
    scheduler: Scheduler = None,
    argument: Arguments = None,
    nearest: Annotated[bool, typer.Option(help="Also calibrate round-to-nearest, to compare with.")] = True,
) -> None:
    """Write one HTML page, which needs no network: drift by timestep, pictures along the way, kernels, numbers."""
    from tfmq_fx.model import load
    from tfmq_fx.report import PAGE, measure, require_packages, write_report

    require_packages("report")  # before minutes of work, not after
    quantized = load(folder)
    target = output or folder.absolute().with_name(f"{folder.absolute().name}-report")
    pipe, arguments = load_pipeline(model, scheduler), _pipeline_arguments(argument)
    numbers, runs = measure(
        pipe,
        quantized,
        num_samples=num_samples,
        num_inference_steps=steps,
        seed=seed,
        nearest=nearest,
        command=shlex.join(["tfmq", *sys.argv[1:]]),
        **arguments,
    )
    write_report(numbers, runs, target, title=f"tfmq_fx: {folder.absolute().name}")
    out.print(f"{target / PAGE}: PSNR {numbers['pictures']['psnr']:.1f} dB, mean of {num_samples} images")


@app.command()
def export(
    folder: Folder,
    target: Annotated[
        Path,
        typer.Argument(help="NAME.pt2, NAME.onnx, or a folder for OpenVINO; absent or whole afterwards."),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="pt2, aot (.pt2), onnx, onnxruntime (.onnx), openvino. Default: by the name; .onnx is onnxruntime's."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Refuse when a quantized layer would run in float (aot, onnx, onnxruntime).")
    ] = False,
) -> None:
    """Write the network for another runtime, and say what of it runs in int8 there."""
    from tfmq_fx.model import load

    quantized = load(folder)
    with Console(stderr=True).status(f"export to {target}"):  # nothing where stderr is no terminal
        written = quantized.export(target, format=format, strict=strict)
    kernels = ", ".join(f"{n} layers {kind}" for kind, n in written.kernels.items())
    weights = ", ".join(f"{n} weights {kind}" for kind, n in written.weights.items())
    facts = [f"{written.bytes / 1e6:.2f} MB", weights, kernels, f"{written.seconds:.0f} s"]
    out.print(f"{target}: {written.format}, " + "; ".join(f for f in facts if f))
    for note in written.notes:
        out.print(f"note: {note}")


def _both(
    pipe: Any, quantized: Any, num_samples: int, steps: int, seed: int, argument: list[str] | None
) -> Any:
    from tfmq_fx.evaluation.sampling import sample as draw

    arguments = _pipeline_arguments(argument)
    settings = {"num_samples": num_samples, "num_inference_steps": steps, "seed": seed, **arguments}
    return draw(pipe, None, **settings), draw(pipe, quantized, **settings)


def main() -> None:
    """Entry point: exit code 2 and one line on stderr for what the user did wrong."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Libraries about themselves, at import; ours are errors or in the report.
    warnings.simplefilter("ignore")
    stdlib_logging.getLogger("torch.utils._pytree").setLevel(stdlib_logging.ERROR)
    # A capture that fails is tried in another way, or is our error: torch need not say so too.
    stdlib_logging.getLogger("torch._subclasses.fake_tensor").setLevel(stdlib_logging.CRITICAL)
    try:
        sys.exit(app(standalone_mode=False))
    except (TFMQError, _UsageError) as error:
        text = error.format_message() if isinstance(error, _UsageError) else str(error)
        if not text:  # `tfmq` alone has shown the help
            sys.exit(2)
        words = text if isinstance(error, _UsageError) and "Usage:" in text else " ".join(text.splitlines())
        Console(stderr=True, soft_wrap=True).print(f"error: {words}", markup=False, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
