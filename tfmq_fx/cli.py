"""The command line: tfmq inspect | quantize | precompute | sample | evaluate | report | export."""

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tfmq_fx.base.errors import TFMQError, first_line
from tfmq_fx.options import (
    Arguments,
    Choices,
    Drawn,
    Folder,
    Precomputing,
    RecipeOption,
    Reference,
    Rows,
    Source,
    from_groups,
    pipeline_arguments,
)
from tfmq_fx.settings import Settings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize diffusion models.",
)
out = Console(soft_wrap=True)

_UsageError: Any = typer.BadParameter.__base__  # from click, or from the copy of click inside a newer typer

# Seed 1: not the noise that `quantize` calibrates with by default.
EVALUATED, REPORTED = Drawn(num_samples=256, seed=1), Drawn(num_samples=16, seed=1)
ERRORS = ("output_relative_mse", "temporal_cosine_distance", "temporal_cosine_distance_worst")


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(version("tfmq_fx"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def load_pipeline(
    model: str | None,
    scheduler: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    device: str | None = None,
    config: str | None = None,
) -> Any:
    """Return the pipeline of a local folder, hub id or single file, or the embedded one for None.

    dtype, variant, device, config: as `Source` has them.

    Raises TFMQError for anything else, and for a dtype or device that does not exist.
    """
    import diffusers
    from diffusers.utils import is_transformers_available, logging

    from tfmq_fx.base.arithmetic import NETWORK_DTYPES, dtype_name
    from tfmq_fx.base.offloaded import usable_device
    from tfmq_fx.demo import embedded_pipeline

    dtypes = {dtype_name(d): d for d in NETWORK_DTYPES}
    if dtype not in (None, *dtypes):
        raise TFMQError(f"--dtype {dtype}: is unknown; use {', '.join(dtypes)}.")
    place = usable_device(device, "--device")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        if is_transformers_available():
            from transformers.utils import logging as of_transformers

            of_transformers.disable_progress_bar()
            of_transformers.set_verbosity_error()  # otherwise it prints which image processors are missing
    if model is None:
        for option, value in (("--config", config), ("--variant", variant)):
            if value is not None:
                raise TFMQError(f"{option} {value}: is for a --model; the embedded one has its own.")
        pipe = embedded_pipeline()
        pipe = pipe if dtype is None else pipe.to(dtypes[dtype])
    else:
        pipe = _from_files(model, config, None if dtype is None else dtypes[dtype], variant)
    if scheduler is not None:
        cls: Any = getattr(diffusers, scheduler, None)
        known = inspect_module.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)
        if not known:
            raise TFMQError(
                f"--scheduler: diffusers has no scheduler {scheduler!r}; use a class name such as DDIMScheduler."
            )
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    return pipe if place is None else pipe.to(place)


def _from_files(model: str, config: str | None, dtype: Any, variant: str | None) -> Any:
    """Return the pipeline of a folder or hub id; of a file, if `model` is one, which needs the folder `config`."""
    import diffusers

    from tfmq_fx.inspection import require_plain_files

    single = os.path.isfile(model)
    folder = config if single else model
    if folder is None:
        raise TFMQError(
            f"{model}: is a single file; give the folder of its pipeline's configuration (model_index.json, and a folder for "
            "each component) with --config."
        )
    if config is not None and not single:
        raise TFMQError(f"--config {config}: is for a --model that is a single file.")
    if (single or os.path.exists(folder)) and not (Path(folder) / "model_index.json").is_file():
        raise TFMQError(f"{folder}: not a diffusers pipeline folder (it has no model_index.json).")
    if variant is None and not single and os.path.exists(model):
        require_plain_files(Path(model))
    try:
        if not single:
            return diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, variant=variant)
        name = diffusers.DiffusionPipeline.load_config(folder)["_class_name"]
        return getattr(diffusers, name).from_single_file(model, config=folder, torch_dtype=dtype)
    except Exception as error:  # diffusers, safetensors and the hub client raise many types
        raise TFMQError(
            f"{model}: diffusers cannot load it ({type(error).__name__}: {first_line(error)})"
        ) from error


def _recipe(text: str) -> Any:
    """Return the recipe of a JSON file, or the preset of that name."""
    from tfmq_fx.recipe import Recipe

    return Recipe.read(Path(text)) if text.endswith(".json") else Recipe.preset(text)


@app.command()
def inspect(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A pipeline's folder or hub id, or a network's folder. Default: the embedded digits DDPM.",
        ),
    ] = None,
    recipe: RecipeOption = "w4a8",
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="For a network's folder: one input as NAME=SHAPE[:DTYPE], e.g. sample=2,4,64,64 or timestep=2:int64.",
        ),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option(help="--no-weights reads only config.json, so a network of any size fits in memory."),
    ] = True,
    timestep: Annotated[
        str | None,
        typer.Option(
            help="The name of the timestep input. Default: `timestep`, or the only input that can be it."
        ),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="The pipeline's component to inspect, if several take a timestep."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    argument: Arguments = None,
) -> None:
    """Show the temporal block, found by dataflow, and what a recipe would do to every layer."""

    from tfmq_fx.calibration.data import CalibrationSet
    from tfmq_fx.calibration.pipelines import denoiser, usual_steps
    from tfmq_fx.inspection import describe, example_inputs, load_network

    chosen = _recipe(recipe)
    if model is not None and os.path.isfile(Path(model) / "config.json"):
        network = load_network(Path(model), weights=weights)
        example = example_inputs(network, inputs or [])
    elif inputs or not weights:
        raise TFMQError(
            f"--input, --no-weights: these need --model to be a network's folder with a config.json, not {model}."
        )
    else:
        pipe = load_pipeline(model)
        which: dict[str, Any] = {"component": component, **({"timestep": timestep} if timestep else {})}
        arguments = pipeline_arguments(argument)
        data = CalibrationSet.record(
            pipe, num_samples=2, num_inference_steps=usual_steps(pipe, 2), **which, **arguments
        )
        timestep = data.timestep  # found by what changes from call to call, if it has another name
        network = data.row_wise(denoiser(pipe, timestep=timestep, component=component))
        example = data.example(2)
    found = describe(network, example, chosen, timestep=timestep)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print_description(found)


def _print_description(found: Mapping[str, Any]) -> None:
    """Print the result of `describe`: the block, then the layers grouped by how they are quantized."""
    block, seconds = found["temporal_block"], found["seconds"]
    out.print(
        f"{found['network']}: {found['parameters'] / 1e6:.2f} M parameters, {found['nodes']} nodes; "
        f"captured in {seconds['capture']:.1f} s, block found in {seconds['find'] * 1e3:.0f} ms"
    )
    inputs = (f"{name} ({', '.join(map(str, sizes))})" for name, sizes in found["inputs"].items())
    out.print(f"inputs: {', '.join(inputs)}")
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
@from_groups
def quantize(
    output: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or an earlier artefact.")],
    source: Source,
    choices: Choices,
    rows: Rows,
    settings: Settings,
) -> None:
    """Calibrate on the pipeline's own trajectories, reconstruct, convert, and write the artefact.

    Run with `torchrun --nproc-per-node=N -m tfmq_fx.cli quantize ..` to share the work between N processes.
    """
    from tfmq_fx.artefact.saving import check_output_folder
    from tfmq_fx.base.parallel import joined
    from tfmq_fx.pipeline import quantize as run

    recipe, preset = _chosen_recipe(choices), _chosen_preset(rows)
    # Beside the output, where the same command finds it after an interruption. Removed once the output is
    # complete.
    real = Path(os.path.realpath(output))
    state = real.with_name(f".{real.name}.state")
    with joined() as ranks:
        check_output_folder(output)  # fail now, not after minutes of work
        settings = dataclasses.replace(settings, state=state, **source.denoiser())
        pipe = load_pipeline(*source.pipeline())
        data = _recorded(pipe, preset, source, rows, settings, processes=ranks.size)
        if choices.max_megabytes is not None:
            recipe = _within(choices.max_megabytes, pipe, recipe, data, settings, source)
        with _naming_state(state):
            quantized = run(pipe, recipe, calibration=data, **settings.arguments())
        if ranks.rank != 0:
            return
    quantized.record_command(shlex.join(["tfmq", *sys.argv[1:]]))
    quantized.save_pretrained(output)
    shutil.rmtree(state, ignore_errors=True)
    _print_quantized(output, choices.recipe, quantized.report)


@contextmanager
def _naming_state(state: Path) -> Iterator[None]:
    """Say after an interruption that the same command continues, if there is a state."""
    try:
        yield
    except KeyboardInterrupt:
        if state.is_dir():
            _print_error(f"{state} has the finished blocks; the same command continues from there.")
        raise


@app.command()
@from_groups
def precompute(
    output: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or an earlier artefact.")],
    source: Source,
    taken: Precomputing,
) -> None:
    """Replace what the network computes from the timestep by tables, quantize nothing, and write the artefact."""
    from tfmq_fx.artefact.saving import check_output_folder
    from tfmq_fx.precomputing import precompute as run

    check_output_folder(output)  # fail now, not after minutes of work
    pipe = load_pipeline(*source.pipeline())
    found = run(pipe, **taken.arguments(), **source.denoiser(), **source.arguments())
    found.record_command(shlex.join(["tfmq", *sys.argv[1:]]))
    found.save_pretrained(output)
    _print_precomputed(output, found.report)


def _print_precomputed(output: Path, report: Mapping[str, Any]) -> None:
    """Print a summary of the report: how many features have which table, and the bytes."""
    sizes, features = report["sizes"], report["maintenance"]["features"]
    kinds = {kind: sum(f["chosen"] == kind for f in features) for kind in ("table", "request", "computed")}
    out.print(
        f"{output}: {len(features)} temporal features at {report['temporal_block']['timesteps']} timesteps: {kinds['table']} from a "
        f"table, {kinds['request']} from one for each request, {kinds['computed']} computed as before"
    )
    out.print(
        f"{sizes['float_bytes'] / 1e6:.2f} MB -> {sizes['quantized_bytes'] / 1e6:.2f} MB ({sizes['ratio']:.3f}), with "
        f"{sizes['table_bytes'] / 1e6:.2f} MB of tables; {sizes['block_bytes'] / 1e6:.2f} MB of layers are kept apart"
    )
    for note in report["notes"]:
        out.print(f"note: {note['name']}: {note['reason']}")


def _chosen_recipe(choices: Choices) -> Any:
    """Return the named recipe, changed by the other options."""
    recipe = _recipe(choices.recipe)
    settings = recipe.reconstruction
    if choices.iterations == 0:
        settings = dataclasses.replace(settings, method="nearest")
    elif choices.iterations is not None:
        method = settings.method if "adaround" in settings.method else "adaround"
        settings = dataclasses.replace(settings, method=method, iterations=choices.iterations)
    if choices.tune_iterations is not None:
        settings = dataclasses.replace(settings, tune_iterations=choices.tune_iterations)
    recipe = dataclasses.replace(recipe, reconstruction=settings)
    changes: dict[str, Any] = {"maintain": choices.maintain, "unseen": choices.unseen}
    return dataclasses.replace(recipe, **{n: x for n, x in changes.items() if x is not None})


def _within(megabytes: float, pipe: Any, recipe: Any, data: Any, settings: Settings, source: Source) -> Any:
    """Return the recipe with the bits of each layer that fit within --max-megabytes."""
    from tfmq_fx.bit_widths import BudgetError, mixed_precision

    try:
        return mixed_precision(
            pipe,
            recipe,
            calibration=data,
            max_bytes=megabytes * 1e6,
            finite=settings.finite,
            seed=settings.seed,
            execution_device=settings.execution_device,
            **source.denoiser(),
        )
    except BudgetError as error:
        raise TFMQError(
            f"--max-megabytes {megabytes:g}: the weights take {error.least / 1e6} MB at their fewest bits; allow at least that."
        ) from error


def _chosen_preset(rows: Rows) -> Any:
    """Return the named calibration preset, or the default one, with the numbers given by options."""
    from tfmq_fx.calibration.presets import CalibrationPreset

    named = rows.calibration
    preset = CalibrationPreset.named(named) if named is not None else CalibrationPreset()
    return dataclasses.replace(
        preset,
        num_samples=rows.num_samples or preset.num_samples,
        num_inference_steps=rows.steps or preset.num_inference_steps,
    )


def _recorded(
    pipe: Any, preset: Any, source: Source, rows: Rows, settings: Settings, *, processes: int
) -> Any:
    """Record the preset's calibration set, with one prompt of the captions for each trajectory."""
    from tfmq_fx.calibration.pipelines import coco_captions, takes_steps

    if rows.calibration is None and rows.steps is None and not takes_steps(pipe):
        preset = dataclasses.replace(preset, num_inference_steps=None)
    arguments = source.arguments() | source.denoiser()
    if rows.captions is not None:
        arguments["prompt"] = coco_captions(rows.captions, num=preset.num_samples, seed=settings.seed)
    arguments |= {"seed": settings.seed, "execution_device": settings.execution_device}
    size = max(1, min(64, -(-preset.num_samples // processes)))
    return preset.record(pipe, batch_size=size, cache=rows.cache, **arguments)


def _print_quantized(output: Path, recipe: str, report: Mapping[str, Any]) -> None:
    """Print a summary of the report: layers, bytes, maintenance of the features, notes, seconds."""
    sizes, block = report["sizes"], report["temporal_block"]
    distances = _values(report, "temporal_cosine_distance")
    distance = sum(distances) / max(1, len(distances))
    out.print(
        f"{output}: {recipe}, {len(report['layers'])} layers, {block['features']} temporal features at "
        f"{block['timesteps']} timesteps (mean cosine distance {distance:.1e})"
    )
    out.print(
        f"{sizes['float_bytes'] / 1e6:.2f} MB float -> {sizes['quantized_bytes'] / 1e6:.2f} MB ({sizes['ratio']:.3f}); report.json lists what stayed in float, and why"
    )
    if (kept := report["maintenance"]).get("features"):
        cached = sum(f["chosen"] == "cache" for f in kept["features"])
        out.print(
            f"maintenance: {cached} of {len(kept['features'])} temporal features cached; {kept['bytes']['chosen'] / 1e3:.1f} kB in "
            f"total, {kept['bytes']['reconstruct'] / 1e3:.1f} kB if all were reconstructed"
        )
    notes: dict[str, int] = {}
    for note in report["notes"]:
        notes[note["reason"]] = notes.get(note["reason"], 0) + 1
    for reason, count in notes.items():
        out.print(f"note: {reason}" + (f" ({count})" if count > 1 else ""))
    out.print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in report["seconds"].items()))


def _values(report: Mapping[str, Any], name: str) -> list[float]:
    """Return one of the report's error measures, at every timestep that has it."""
    return [errors[name] for errors in report["errors_by_timestep"] if name in errors]


@app.command()
@from_groups
def sample(
    folder: Folder,
    source: Source,
    drawn: Drawn,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("samples.png"),
) -> None:
    """Write a PNG of float beside quantized samples, from the same noise."""
    from tfmq_fx.base.files import require_writable
    from tfmq_fx.base.metrics import psnr
    from tfmq_fx.evaluation.sampling import save_grid
    from tfmq_fx.model import load

    require_writable(output)  # fail now, not after minutes of work
    if output.suffix.lower() != ".png":
        raise TFMQError(f"--output {output}: is written as PNG; use a name that ends in .png.")
    images = _both(load(folder), source, drawn)
    save_grid([("float", images[0]), (folder.name, images[1])], output)
    out.print(
        f"{output}: {drawn.num_samples} samples, {drawn.steps} steps, PSNR {psnr(images[1], images[0]):.1f} dB over all pixels"
    )


@app.command()
@from_groups
def evaluate(folder: Folder, source: Source, reference: Reference, drawn: Drawn = EVALUATED) -> None:
    """Compare with the float pipeline from the same noise: PSNR, and the report's errors by timestep.

    With --real, also compare the samples of both with real images.
    """
    from tfmq_fx.model import load

    quantized = load(folder)
    against = _RealPictures(reference.real, reference, drawn) if reference.real is not None else None
    images = _both(quantized, source, drawn)
    table = Table("measure", "value")
    _add_comparison(table, images, drawn)
    _add_errors(table, quantized.report)
    out.print(table)
    if against is not None:
        against.print_distances({"float": images[0], "quantized": images[1]})


def _add_comparison(table: Table, images: tuple[Any, Any], drawn: Drawn) -> None:
    """Add a row for each comparison of the quantized samples (N, C, H, W) with the float ones."""
    from tfmq_fx.base.metrics import psnr, psnr_by_image

    by_image = psnr_by_image(images[1], images[0])
    table.add_row(
        "PSNR to float, mean of images",
        f"{by_image.mean():.2f} dB (range 2, {drawn.num_samples} samples, {drawn.steps} steps)",
    )
    table.add_row("PSNR to float, median of images", f"{by_image.median():.2f} dB")
    table.add_row("PSNR to float, all pixels pooled", f"{psnr(images[1], images[0]):.2f} dB")
    table.add_row("worst 1% of images below", f"{by_image.quantile(0.01):.2f} dB")


def _add_errors(table: Table, report: Mapping[str, Any]) -> None:
    """Add a row for each error measure that the report recorded at calibration."""
    for name in ERRORS:
        if values := _values(report, name):
            mean = sum(values) / len(values)
            table.add_row(f"{name} at calibration", f"mean {mean:.2e}, worst {max(values):.2e}")
    table.add_row("unseen timesteps", str(len(report["unseen_timesteps"])))


class _RealPictures:
    """Real images to compare samples with, checked before anything is sampled."""

    def __init__(self, folder: Path, reference: Reference, drawn: Drawn) -> None:
        """Check the images and load the extractor.

        Raises TFMQError for too few or unreadable images, or if the extractor is missing.
        """
        from tfmq_fx.evaluation.extractors import NEIGHBOURS, extractor_named
        from tfmq_fx.evaluation.folders import check_images

        if drawn.num_samples <= NEIGHBOURS:
            raise TFMQError(
                f"--num-samples {drawn.num_samples}: precision and recall need more than {NEIGHBOURS} samples."
            )
        self.folder, self.drawn = folder, drawn
        check_images(folder, num=drawn.num_samples, seed=drawn.seed)
        self.extract = extractor_named(reference.extractor or "inception", reference.extractor_weights)

    def print_distances(self, samples: Mapping[str, Any]) -> None:
        """Print a table of distances to the real images, for each named set of samples (N, C, H, W)."""
        from tfmq_fx.evaluation.extractors import set_distances
        from tfmq_fx.evaluation.folders import images_from

        _, channels, *size = next(iter(samples.values())).shape
        count, seed = self.drawn.num_samples, self.drawn.seed
        real = self.extract(images_from(self.folder, size=size, channels=channels, num=count, seed=seed))
        found = [set_distances(self.extract(images), real) for images in samples.values()]
        table = Table(f"to {count} real images", *samples)
        for name in found[0]:
            table.add_row(name, *(f"{values[name]:.4g}" for values in found))
        out.print(table)
        if count <= (features := real.pooled_ND.shape[1]):
            out.print(
                f"note: {count} samples of {features} features: so few samples overestimate the Frechet distance"
            )


@app.command()
@from_groups
def report(
    folder: Folder,
    source: Source,
    drawn: Drawn = REPORTED,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: the artefact's name, followed by -report.")
    ] = None,
    nearest: Annotated[
        bool, typer.Option(help="Also calibrate with round-to-nearest, for comparison.")
    ] = True,
) -> None:
    """Write one HTML page that opens offline: drift by timestep, intermediate images, kernels, numbers."""
    from tfmq_fx.model import load
    from tfmq_fx.report import PAGE, check_report_folder, measure, require_packages, write_report

    require_packages("report")  # fail now, not after minutes of work
    quantized = load(folder)
    target = output or folder.absolute().with_name(f"{folder.absolute().name}-report")
    check_report_folder(target)
    pipe, arguments = load_pipeline(*source.pipeline()), source.arguments()
    quantized = _beside(pipe, quantized, source)
    command = shlex.join(["tfmq", *sys.argv[1:]])
    numbers, runs = measure(
        pipe,
        quantized,
        **drawn.arguments(),
        nearest=nearest,
        command=command,
        component=source.component,
        **arguments,
    )
    write_report(numbers, runs, target, title=f"tfmq_fx: {folder.absolute().name}")
    out.print(
        f"{target / PAGE}: PSNR {numbers['pictures']['psnr']:.1f} dB, mean of {drawn.num_samples} images"
    )


@app.command()
def export(
    folder: Folder,
    target: Annotated[
        Path,
        typer.Argument(
            help="NAME.pt2, NAME.onnx, or a folder for OpenVINO. It is written completely or not at all."
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="pt2, aot (.pt2), onnx, onnxruntime (.onnx) or openvino. Default: by the target's name; for .onnx, onnxruntime."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Fail if a quantized layer would run in float (aot, onnx, onnxruntime).")
    ] = False,
) -> None:
    """Write the network for another runtime, and print which layers run in int8 there."""
    from tfmq_fx.model import load

    quantized = load(folder)
    with Console(stderr=True).status(f"export to {target}"):  # prints nothing unless stderr is a terminal
        written = quantized.export(target, format=format, strict=strict)
    kernels = ", ".join(f"{n} layers {kind}" for kind, n in written.kernels.items())
    weights = ", ".join(f"{n} weights {kind}" for kind, n in written.weights.items())
    facts = [f"{written.bytes / 1e6:.2f} MB", weights, kernels, f"{written.seconds:.0f} s"]
    out.print(f"{target}: {written.format}, " + "; ".join(f for f in facts if f))
    for note in written.notes:
        out.print(f"note: {note}")


def _both(quantized: Any, source: Source, drawn: Drawn) -> tuple[Any, Any]:
    """Return samples (N, C, H, W) of the float network and of the quantized one, from the same noise."""
    from tfmq_fx.evaluation.sampling import sample as draw

    which = source.denoiser(quantized.interface.timestep)
    settings = drawn.arguments() | source.arguments() | which
    pipe = load_pipeline(*source.pipeline())
    quantized = _beside(pipe, quantized, source)
    return draw(pipe, None, **settings), draw(pipe, quantized, **settings)


def _beside(pipe: Any, quantized: Any, source: Source) -> Any:
    """Return the quantized network on the device and in the precision of the pipeline's own.

    Raises TFMQError if it was made of another network.
    """
    from tfmq_fx.calibration.pipelines import denoiser
    from tfmq_fx.evaluation.sampling import require_made_of

    own: Any = denoiser(pipe, **source.denoiser(quantized.interface.timestep))
    require_made_of(quantized, own)
    return quantized.to(own.device, own.dtype)


def main() -> None:
    """Run the command line. A user error exits with code 2 and one line on stderr."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Libraries warn about themselves at import. Our own warnings are errors, or are in the report.
    warnings.simplefilter("ignore")
    stdlib_logging.getLogger("torch.utils._pytree").setLevel(stdlib_logging.ERROR)
    # A failed capture is tried in another way or becomes our error, so torch need not log it as well.
    stdlib_logging.getLogger("torch._subclasses.fake_tensor").setLevel(stdlib_logging.CRITICAL)
    try:
        sys.exit(app(standalone_mode=False))
    except (TFMQError, _UsageError) as error:
        text = error.format_message() if isinstance(error, _UsageError) else str(error)
        if not text:  # `tfmq` without arguments has printed the help
            sys.exit(2)
        words = text if isinstance(error, _UsageError) and "Usage:" in text else " ".join(text.splitlines())
        _print_error(f"error: {words}")
        sys.exit(2)


def _print_error(words: str) -> None:
    Console(stderr=True, soft_wrap=True).print(words, markup=False, highlight=False)


if __name__ == "__main__":
    main()
