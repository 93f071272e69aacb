"""Find a pipeline's denoiser, and run the pipeline for a number of samples."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq_fx.artefact.drop_in import DropIn, uncounted
from tfmq_fx.base.errors import TFMQError, nearest_names, require_type
from tfmq_fx.base.signatures import hides_arguments, signature_of
from tfmq_fx.calibration.prompts import PROMPTS

log = logging.getLogger(__name__)

OWN_PROMPTS = f"no prompt is given, so {len(PROMPTS)} of tfmq_fx's own are used; for yours, calibrate with CalibrationSet.record(pipe, prompt=[..], ..)"
SCHEDULES = ("timesteps", "sigmas")  # lists that no short run is asked about: they are its length
LONGEST = 4  # values of a list that a short run is given; the first two of a longer list
MOST_CHOICES = 64  # of lists to try


def takes_timestep(module: nn.Module, timestep: str) -> bool:
    """Return True if the module has an argument of the name `timestep`."""
    if isinstance(module, DropIn):
        return module.interface.timestep == timestep
    return timestep in signature_of(module).parameters


def require_model(model: Any, component: str | None) -> None:
    """Raise TFMQError unless this is a pipeline or a network, and for a component's name beside a network."""
    if isinstance(model, nn.Module):
        if component is not None:
            raise TFMQError(
                f"component: {component!r} is for a pipeline, but a {type(model).__name__} is given; leave it out."
            )
    elif not _is_pipeline(model):
        require_type(model, nn.Module, "model", "give a loaded diffusers pipeline, or a network (nn.Module)")


def _is_pipeline(x: Any) -> bool:
    return isinstance(getattr(x, "components", None), Mapping)


def network_of(model: Any, *, timestep: str, component: str | None) -> nn.Module:
    """Return a network as it is, and of a pipeline the `denoiser`."""
    return model if isinstance(model, nn.Module) else denoiser(model, timestep=timestep, component=component)


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
    if not found:
        _refuse_wrapped(modules)
    if len(found) != 1:
        raise TFMQError(
            f"pipeline: {len(found) or 'no'} components take a {timestep!r} ({', '.join(found) or ', '.join(pipe.components)}); "
            "name one with component=, or quantize the network itself with "
            "quantize(network, calibration=CalibrationSet.from_tensors(..))."
        )
    return next(iter(found.values()))


def holders(pipe: Any, network: nn.Module, path: str = "") -> Iterator[tuple[Any, str, str]]:
    """Yield each pipeline that holds a network, its name there, and its path: a combined pipeline has others, which it calls."""
    for name, module in pipe.components.items():
        if module is network:
            yield pipe, name, path + name
    for name, inner in vars(pipe).items():
        if isinstance(getattr(inner, "components", None), Mapping):
            yield from holders(inner, network, f"{path}{name}.")


def _refuse_wrapped(modules: Mapping[str, nn.Module]) -> None:
    """Raise TFMQError for a wrapper whose arguments are unknown, because the networks in it have different ones."""
    for name, module in modules.items():
        if hides_arguments(module) and signature_of(module) == inspect.signature(module.forward):
            inner = next((n for n, _ in module.named_children()), None)
            remedy = f"set pipe.{name} = pipe.{name}.{inner}" if inner else "unwrap it"
            raise TFMQError(
                f"pipeline: {name!r} is wrapped in a {type(module).__name__}, which hides its arguments; {remedy}."
            )


def run_pipeline(pipe: Any, num_samples: int, *, first: int = 0, **pipe_kwargs: Any) -> Any:
    """Run the pipeline and return its output, `num_samples` numpy images: samples first, first + 1, ...

    pipe_kwargs: passed to the pipeline; see `call_pipeline`.

    Raises TFMQError where `call_pipeline` does, and for a pipeline that returns no images.
    """
    found = call_pipeline(pipe, num_samples, first=first, **pipe_kwargs)
    if not isinstance(found, Mapping) or "images" not in found:
        shown = ", ".join(found) if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise TFMQError(
            f"{type(pipe).__name__} returns {shown} and no images; its calls can be recorded, but no pictures drawn from it."
        )
    return found["images"]


def call_pipeline(
    pipe: Any, num_samples: int, *, first: int = 0, whole: Collection[str] | None = None, **pipe_kwargs: Any
) -> Any:
    """Run the pipeline for samples first, first + 1, ..., and return whatever it returns.

    whole: the names of the lists that are not one value per sample. None asks the pipeline, by `whole_lists`.
    pipe_kwargs: passed to the pipeline. A list has one value per sample (prompts, labels), and is repeated if it
        is shorter, unless it is in `whole`. A tuple is passed unchanged, and so are lists of timesteps and sigmas.

    Raises TFMQError for an empty list, for an argument that the pipeline does not take, and for arguments that it
    rejects.
    """
    _lists(pipe_kwargs)
    takes = inspect.signature(pipe.__call__).parameters
    unknown = [n for n in pipe_kwargs if n not in takes] if not _takes_any(takes) else []
    if unknown:
        raise TFMQError(f"{type(pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(takes)}.")
    whole = whole_lists(pipe, pipe_kwargs) if whole is None else whole
    given = _for_samples(takes, num_samples, first, whole, pipe_kwargs)
    if "output_type" in takes or _takes_any(takes):
        given.setdefault("output_type", "np")
    try:
        return pipe(**given)
    except (
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # raised by the pipeline's checks of its arguments
        raise TFMQError(f"{type(pipe).__name__}: {error}") from error


def require_pipeline(pipe: Any, pipe_kwargs: Mapping[str, Any]) -> None:
    """Raise TFMQError unless this is a pipeline, and these are arguments for it that recording does not set itself.

    A pipeline may take any argument by `**kwargs`; then one that it does not name is logged.
    """
    if not _is_pipeline(pipe) or not callable(pipe):
        raise TFMQError(
            f"calibration: a {type(pipe).__name__} is no pipeline; give a diffusers pipeline, or make the set of a network's inputs "
            "with CalibrationSet.from_tensors."
        )
    if "generator" in pipe_kwargs:
        raise TFMQError("calibration: generator= is set by recording, one for each batch; give seed=.")
    takes = inspect.signature(pipe.__call__).parameters
    for name in pipe_kwargs:
        if name not in takes and _takes_any(takes):
            log.warning(
                "calibration: %s names no argument %r, and may ignore it; it takes %s",
                type(pipe).__name__,
                name,
                nearest_names(name, takes),
            )


def prompts_for(pipe: Any, pipe_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `PROMPTS` as the pipeline's argument if it needs a prompt and these arguments give none, else {}."""
    taken = inspect.signature(pipe.__call__).parameters.get("prompt")
    given = any(name.startswith("prompt") and x is not None for name, x in pipe_kwargs.items())
    if taken is None or given or taken.default not in (None, taken.empty):
        return {}
    log.warning("calibration: %s", OWN_PROMPTS)
    return {"prompt": list(PROMPTS)}


def _for_samples(
    takes: Collection[str], size: int, first: int, whole: Collection[str], pipe_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call that draws samples first .. first + size - 1."""
    given = dict(pipe_kwargs)
    lists = {n: v for n, v in _lists(given).items() if n not in whole}
    for name, values in lists.items():
        given[name] = [values[(first + i) % len(values)] for i in range(size)]
    per_prompt = [n for n in takes if n.startswith("num_") and n.endswith("_per_prompt")]
    if "batch_size" in takes:
        given.setdefault("batch_size", size)
    elif not lists and "num_images_per_prompt" in takes:
        given.setdefault("num_images_per_prompt", size)
    elif not lists and isinstance(given.get("prompt"), str):
        given["prompt"] = [given["prompt"]] * size
    elif not lists and per_prompt:  # of videos or sounds
        given.setdefault(per_prompt[0], size)
    return given


def _lists(pipe_kwargs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the lists that may be one value per sample. Raises TFMQError for an empty one."""
    found = {n: v for n, v in pipe_kwargs.items() if isinstance(v, list) and n not in SCHEDULES}
    for name, values in found.items():
        if not values:
            raise TFMQError(f"{name}: the list is empty.")
    return found


def takes_steps(pipe: Any, *, by_name: bool = False) -> bool:
    """Return True if a pipeline takes a number of steps; others take a list of noise levels, or have a number of their own.

    by_name: as an argument of that name, and not among any others.
    """
    takes = inspect.signature(pipe.__call__).parameters
    return "num_inference_steps" in takes or (not by_name and _takes_any(takes))


def usual_steps(pipe: Any, count: int = 50) -> int | None:
    """Return how many steps a pipeline is asked for if nobody says: None if it takes no number of steps."""
    return count if takes_steps(pipe) else None


def given_steps(steps: int | None) -> dict[str, int]:
    """Return the argument of a call for so many steps; none for None. Raises TFMQError for no steps."""
    if steps is not None and not steps > 0:
        raise TFMQError(f"num_inference_steps: {steps} is not positive.")
    return {} if steps is None else {"num_inference_steps": steps}


def few_steps(steps: int | None) -> Sequence[int | None]:
    """Return the numbers of steps of short runs, each to be tried if the one before is too small: 2, 4, 8, .., `steps`.

    A pipeline may skip steps by its own arguments: img2img with strength 0.3 takes none of two. None is tried alone.
    """
    if steps is None:
        return [None]
    return [*(2**i for i in range(1, steps.bit_length()) if 2**i < steps), steps]


def whole_lists(pipe: Any, pipe_kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the list arguments that are not one value per sample, but one per adapter, layer, ...

    The pipeline decides, in short runs. Such a list can be given as it is, and the pipeline still draws as many
    samples as it is asked for. With a list of one value per sample, it draws another number or raises an error.
    If no choice works, the pipeline may draw one sample only: then the lists with which it does so stay as they are, and
    the others are one value per sample.
    """
    names = list(_lists(pipe_kwargs))
    trial = _Trial(pipe, dict(pipe_kwargs))
    choices = (set(c) for k in range(len(names) + 1) for c in combinations(names, k))
    whole = next((c for c in islice(choices, MOST_CHOICES) if names and trial.works(c)), None)
    if whole is None:
        return trial.alone() if names else frozenset()
    for name in names:
        # The last list that is left is what makes the number of samples.
        last = len(names) == len(whole) + 1 and "batch_size" not in trial.takes
        if name not in whole and not last and trial.works(whole | {name}):
            whole.add(name)
    return frozenset(whole)


class _Trial:
    """Short runs of a pipeline that tell which lists it takes as they are."""

    def __init__(self, pipe: Any, pipe_kwargs: dict[str, Any]) -> None:
        self.pipe, self.given = pipe, pipe_kwargs
        self.takes = inspect.signature(pipe.__call__).parameters
        self.short = {n: v if len(v) <= LONGEST else v[:2] for n, v in _lists(pipe_kwargs).items()}
        # A list of one value per sample must not fit: neither by its length, nor cut or repeated.
        lengths = [len(v) for v in self.short.values()]
        enough = range(max([1, *lengths]) + 1, 2 * LONGEST)
        self.size = next(s for s in enough if all(n == 1 or s % n for n in lengths))

    def alone(self) -> frozenset[str]:
        """Return the most lists which the pipeline takes as they are when it draws one sample."""
        names = list(self.short)
        self.short, self.size = _lists(self.given), 1
        choices = (frozenset(c) for k in range(len(names), 0, -1) for c in combinations(names, k))
        return next((c for c in islice(choices, MOST_CHOICES) if self.works(c)), frozenset())

    def works(self, whole: Collection[str]) -> bool:
        """Return True if the pipeline takes these lists as they are, and draws as many samples as it is asked for."""
        given = {**self.given, **{n: self.short[n] for n in whole}}
        steps = given.pop("num_inference_steps", None)
        for tried in few_steps(steps):
            given |= given_steps(tried)
            if "generator" in self.takes:
                given["generator"] = torch.Generator().manual_seed(0)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=()), uncounted():
                    found = call_pipeline(self.pipe, self.size, whole=whole, **given)
            except Exception:  # a pipeline may raise anything for a list of the wrong length
                continue
            return _count(found) == self.size
        return False


def _count(found: Any) -> int | None:
    """Return the number of samples in a pipeline's output; None if it cannot be told."""
    values = list(found.values()) if isinstance(found, Mapping) else found
    first = values[0] if isinstance(values, (list, tuple)) and values else values
    return len(first) if hasattr(first, "__len__") else None


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
