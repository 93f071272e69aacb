"""Find a pipeline's denoiser, and run the pipeline for a number of samples."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.base.errors import TFMQError

SCHEDULES = ("timesteps", "sigmas")  # lists of a pipeline's arguments that are not one value per sample


def takes_timestep(module: nn.Module, timestep: str) -> bool:
    """Return True if the module has an argument of the name `timestep`."""
    if isinstance(module, DropIn):
        return module.interface.timestep == timestep
    return timestep in inspect.signature(module.forward).parameters


def denoiser(pipe: Any, *, timestep: str = "timestep", component: str | None = None) -> nn.Module:
    """Return the pipeline's component that takes an argument of the name `timestep`.

    component: the name of one of several. Raises TFMQError if it takes no such argument, and, without a name,
    unless exactly one component takes it.
    """
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    found = {name: module for name, module in modules.items() if takes_timestep(module, timestep)}
    if component is not None:
        if component not in found:
            raise TFMQError(
                f"component: {component!r} takes no {timestep!r}; components that do: {', '.join(found) or 'none'}."
            )
        return found[component]
    if len(found) != 1:
        raise TFMQError(
            f"pipeline: {len(found) or 'no'} components take a {timestep!r} ({', '.join(found) or ', '.join(pipe.components)}); "
            "name one with component=, or quantize the network itself with "
            "quantize(network, calibration=CalibrationSet.from_tensors(..))."
        )
    return next(iter(found.values()))


def run_pipeline(pipe: Any, num_samples: int, *, first: int = 0, **pipe_kwargs: Any) -> Any:
    """Run the pipeline and return its output, `num_samples` numpy images: samples first, first + 1, ...

    pipe_kwargs: passed to the pipeline. A list has one value per sample (prompts, labels), and is repeated if it
        is shorter. A tuple is passed unchanged, and so are lists of timesteps and sigmas.

    Raises TFMQError for an empty list, for an argument that the pipeline does not take, for arguments that it
    rejects, and for a pipeline that returns no images.
    """
    takes = inspect.signature(pipe.__call__).parameters
    lists = {n: v for n, v in pipe_kwargs.items() if isinstance(v, list) and n not in SCHEDULES}
    for name, values in lists.items():
        if not values:
            raise TFMQError(f"{name}: the list is empty.")
        pipe_kwargs[name] = [values[(first + i) % len(values)] for i in range(num_samples)]
    if "batch_size" in takes:
        pipe_kwargs.setdefault("batch_size", num_samples)
    elif not lists and "num_images_per_prompt" in takes:
        pipe_kwargs.setdefault("num_images_per_prompt", num_samples)
    elif not lists and isinstance(pipe_kwargs.get("prompt"), str):
        pipe_kwargs["prompt"] = [pipe_kwargs["prompt"]] * num_samples
    unknown = [n for n in pipe_kwargs if n not in takes] if not _takes_any(takes) else []
    if unknown:
        raise TFMQError(f"{type(pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(takes)}.")
    try:
        found = pipe(output_type="np", **pipe_kwargs)
    except (
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # raised by the pipeline's checks of its arguments
        raise TFMQError(f"{type(pipe).__name__}: {error}") from error
    if "images" not in found:
        raise TFMQError(f"{type(pipe).__name__} returns {', '.join(found)}, but no images.")
    return found.images


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def coco_captions(file: str | Path, *, num: int | None = None, seed: int = 0) -> list[str]:
    """Return the first caption of each image in a COCO captions file (`captions_val2014.json`).

    num: draw this many of them, by `seed`; None for all, in order.

    Raises TFMQError if the file is missing, is not a captions file, or has fewer images than `num`.
    """
    try:
        entries = json.loads(Path(file).read_text())["annotations"]
        captions: dict[Any, str] = {}
        for entry in sorted(entries, key=lambda e: (e["image_id"], e["id"])):
            captions.setdefault(entry["image_id"], str(entry["caption"]).strip())
    except OSError as error:
        raise TFMQError(f"{file}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TFMQError(f"{file}: not a COCO captions file ({type(error).__name__}: {error}).") from error
    found = list(captions.values())
    if num is None:
        return found
    if num > len(found):
        raise TFMQError(f"{file}: has captions of {len(found)} images, but num={num}.")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:num].tolist()]
