"""Groups of command-line options as frozen dataclasses, and a decorator for commands that take such groups.

Each field is an option: its annotation is typer's, or its metadata has the "help" text. `from_groups` passes
the fields of all groups to typer as plain options, so `--help` shows them as such, and calls the command with
the groups.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.settings import check_seed

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", help="w8a8, w4a8, w8a16, w4a16, w4a4, w3a8, w2a8, or a JSON file with fields of Recipe."
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option("--argument", help="A pipeline argument as NAME=JSON, e.g. class_labels=[1,2]."),
]
Folder = Annotated[Path, typer.Argument(help="A folder written by `tfmq quantize` or `tfmq precompute`.")]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A pipeline and the arguments of its calls."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A diffusers pipeline folder or hub id, or a checkpoint file with --config. Default: the embedded digits DDPM.",
        ),
    ] = None
    config: Annotated[
        str | None,
        typer.Option(
            help="With a checkpoint file as --model: the folder with the pipeline's model_index.json and configurations."
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(help="A diffusers scheduler class, e.g. DDIMScheduler. Default: the pipeline's own."),
    ] = None
    argument: Arguments = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the pipeline: float32, float16 or bfloat16. Default: diffusers' own, float32."
        ),
    ] = None
    variant: Annotated[
        str | None, typer.Option(help="Of the weights' files, e.g. fp16 for *.fp16.safetensors.")
    ] = None
    timestep: Annotated[
        str | None,
        typer.Option(
            help="The denoiser's argument for the timestep. Default: timestep, or the artefact's own."
        ),
    ] = None
    component: Annotated[
        str | None,
        typer.Option(
            help="The pipeline's component to quantize, e.g. transformer_2, if several take a timestep."
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Where the pipeline and every stage run, e.g. cuda:0. Default: cpu.")
    ] = None

    def pipeline(self) -> tuple[str | None, ...]:
        """Return the arguments of `load_pipeline`."""
        return self.model, self.scheduler, self.dtype, self.variant, self.device, self.config

    def denoiser(self, timestep: str = "timestep") -> dict[str, Any]:
        """Return the arguments of `calibration.pipelines.denoiser`. timestep: the name if none is given."""
        return {"timestep": self.timestep or timestep, "component": self.component}

    def arguments(self) -> dict[str, Any]:
        """Return the pipeline's arguments by name, as `pipeline_arguments` does."""
        return pipeline_arguments(self.argument)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows to record for calibration."""

    num_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Number of calibration trajectories. Default: 64, or the preset's."),
    ] = None
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of denoising steps. Default: 50, or the preset's.")
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A preset with a paper's settings: ddim-cifar10, ldm-bedrooms, ldm-churches, ldm-celebahq, ldm-ffhq, ldm-imagenet, sd14-coco, sdxl."
        ),
    ] = None
    captions: Annotated[
        Path | None,
        typer.Option(help="A COCO captions file (JSON): each trajectory takes one prompt from it."),
    ] = None
    cache: Annotated[Path | None, typer.Option(help="A folder to keep recorded trajectories in.")] = None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The recipe, and the changes to it from the command line."""

    recipe: RecipeOption = "w4a8"
    iterations: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Iterations of learned rounding (adaround) per block; 0: round to nearest. Default: the recipe's.",
        ),
    ] = None
    tune_iterations: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Iterations of tuning all blocks together afterwards; 0: no tuning. Default: the recipe's.",
        ),
    ] = None
    maintain: Annotated[
        str | None,
        typer.Option(
            help="How temporal features are computed: reconstruct (by the quantized block), cache (from tables), or auto. Default: the recipe's."
        ),
    ] = None
    unseen: Annotated[
        str | None,
        typer.Option(
            help="What a timestep outside the table uses: nearest (its neighbour's scales), float (a copy of the float temporal "
            "block) or error. Default: the recipe's."
        ),
    ] = None
    max_megabytes: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="Budget for the weights: each layer gets 4 or 8 bits, by its measured effect on the output. Default: the recipe's bits.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Precomputing:
    """The arguments of `precompute` that are its own."""

    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps of the schedule.")] = 50
    finite: Annotated[
        list[str] | None,
        typer.Option(help="An input with finitely many values, as NAME=JSON, e.g. class_labels=[0,1,2]."),
    ] = None
    unseen: Annotated[
        str,
        typer.Option(
            help="What a timestep outside the tables does: float (the layers are kept, and evaluated), nearest or error."
        ),
    ] = "float"
    block: Annotated[
        str,
        typer.Option(help="Where the layers are kept: cpu, disk (memory-mapped) or device (the network's)."),
    ] = "cpu"

    def arguments(self) -> dict[str, Any]:
        """Return the fields as keyword arguments of `precompute`."""
        return {
            "num_inference_steps": self.steps,
            "finite": named_json("--finite", self.finite) or None,
            "unseen": self.unseen,
            "block": self.block,
        }


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The samples to draw."""

    num_samples: Annotated[int, typer.Option(min=1)] = 64
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps.")] = 50
    seed: Annotated[int, typer.Option(help="Seed of the noise and of calibration.")] = 0

    def __post_init__(self) -> None:
        check_seed(self.seed, "--seed")

    def arguments(self) -> dict[str, Any]:
        """Return the fields as keyword arguments of `evaluation.sampling.sample`."""
        return {"num_samples": self.num_samples, "num_inference_steps": self.steps, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images to compare samples with."""

    real: Annotated[
        Path | None,
        typer.Option(
            help="A folder of real images, flat or with one folder per class: compare the samples with as many of them."
        ),
    ] = None
    extractor: Annotated[
        str | None,
        typer.Option(
            help="With --real: inception (the network of published FIDs; needs torch-fidelity) or torchvision-inception. Default: inception."
        ),
    ] = None
    extractor_weights: Annotated[
        Path | None,
        typer.Option(
            help="The extractor's weights file. Default: the one in torch's cache. Nothing is downloaded."
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.real is None and (self.extractor or self.extractor_weights):
            raise TFMQError(
                "--extractor, --extractor-weights: these need --real; give it a folder of real images."
            )


def named_json(option: str, values: list[str] | None) -> dict[str, Any]:
    """Return NAME=JSON texts as a dict. Raises TFMQError, naming the option, for a text of another form."""
    found = {}
    for text in values or []:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise TFMQError(
                f"{option} {text!r}: use NAME=JSON; a string needs quotes, e.g. prompt='\"a cat\"'."
            ) from error
    return found


def pipeline_arguments(values: list[str] | None) -> dict[str, Any]:
    """Return the values of --argument as a dict. Raises TFMQError for a name that the command sets itself."""
    from tfmq_fx.calibration.data import CalibrationSet

    found = named_json("--argument", values)
    ours = {*inspect.signature(CalibrationSet.record).parameters, "generator", "output_type"}
    if wrong := [name for name in found if name in ours]:
        raise TFMQError(f"--argument {wrong[0]}: the command sets this itself; see its --help.")
    return found


def from_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command for typer, with each dataclass parameter replaced by its fields as options.

    If such a parameter has a default, which is an instance, that sets the options' defaults. Otherwise they
    are the dataclass's own.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[inspect.Parameter]]] = {}
    readers: dict[str, Callable[[Any], Any]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        cls: Any = hints[name]
        if dataclasses.is_dataclass(cls):
            options = [_option(cls, f, parameter.default, readers) for f in dataclasses.fields(cls)]
            groups[name] = (cls, [o for o in options if o is not None])
            parameters += groups[name][1]
        else:
            kind = inspect.Parameter.KEYWORD_ONLY  # a group without defaults may follow one with defaults
            parameters.append(parameter.replace(annotation=hints[name], kind=kind))

    def call(**given: Any) -> None:
        given = {name: readers.get(name, _as_it_is)(value) for name, value in given.items()}
        made = {
            name: cls(**{option.name: given.pop(option.name) for option in options})
            for name, (cls, options) in groups.items()
        }
        command(**given, **made)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _as_it_is(value: Any) -> Any:
    return value


def _option(
    cls: Any, field: dataclasses.Field[Any], defaults: Any, readers: dict[str, Callable[[Any], Any]]
) -> inspect.Parameter | None:
    """Return the field as a command's parameter, or None if it is not an option.

    A mapping is read from NAME=JSON texts: its reader is added to `readers`.
    """
    annotation = get_type_hints(cls, include_extras=True)[field.name]
    default = getattr(defaults, field.name) if isinstance(defaults, cls) else field.default
    if get_origin(annotation) is not Annotated:
        if "help" not in field.metadata:
            return None
        if any(get_origin(part) is Mapping for part in get_args(annotation)):
            annotation = list[str] | None
            readers[field.name] = partial(named_json, f"--{field.name}")
        annotation = Annotated[annotation, typer.Option(help=field.metadata["help"])]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
