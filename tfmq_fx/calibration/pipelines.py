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
    if isinstance(module, DropIn):
        return module.interface.timestep == timestep
    return timestep in inspect.signature(module.forward).parameters


def denoiser(pipe: Any, *, timestep: str = "timestep", component: str | None = None) -> nn.Module:
    """The pipeline's component that is called with a `timestep`, or the one named. Raises TFMQError when that is not one."""
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    found = {name: module for name, module in modules.items() if takes_timestep(module, timestep)}
    if component is not None:
        if component not in found:
            raise TFMQError(
                f"component: {component!r} takes no {timestep!r}; only {', '.join(found) or 'no component'} does."
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
    """The pipeline's output as numpy images, `num_samples` of them: samples first, first + 1, ...

    A list among pipe_kwargs has one value per sample, taken in turn (prompts, labels); a tuple is passed as it is, and so
    are lists of timesteps and sigmas.
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
    except (AttributeError, TypeError, ValueError) as error:  # pipelines check what they are given
        raise TFMQError(f"{type(pipe).__name__}: {error}") from error
    if "images" not in found:
        raise TFMQError(f"{type(pipe).__name__} returns {', '.join(found)} and no images.")
    return found.images


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def coco_captions(file: str | Path, *, num: int | None = None, seed: int = 0) -> list[str]:
    """One caption for each image of a COCO captions file (`captions_val2014.json`), its first; `num` of them, drawn by `seed`.

    Raises TFMQError when the file is missing, is no such file, or has fewer images than `num`.
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
        raise TFMQError(f"{file}: captions of {len(found)} images, {num} were asked for.")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:num].tolist()]
