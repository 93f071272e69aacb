"""Find the timestep's argument by what a pipeline gives its networks: it changes from call to call, and is the same for all samples."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.artefact.drop_in import uncounted
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.calls import Call, recorded
from tfmq_fx.calibration.pipelines import call_pipeline, given_steps, takes_timestep, whole_lists

log = logging.getLogger(__name__)

USUAL = "timestep"


def timestep_of(
    pipe: Any, timestep: str, *, component: str | None, steps: int | None, pipe_kwargs: Mapping[str, Any]
) -> str:
    """Return `timestep`, or the only argument that can be it if that is the default, and no network takes one of that name.

    steps: of the short run that shows which arguments change. Raises TFMQError if there are several.
    """
    modules = {
        n: m for n, m in pipe.components.items() if isinstance(m, nn.Module) and component in (None, n)
    }
    if timestep != USUAL or any(takes_timestep(m, timestep) for m in modules.values()):
        return timestep
    given = {**pipe_kwargs, **given_steps(steps)}
    try:
        whole = whole_lists(pipe, given)  # runs it, too
        with _watched(modules) as calls, torch.no_grad(), torch.random.fork_rng(devices=()), uncounted():
            call_pipeline(pipe, 1, whole=whole, generator=torch.Generator().manual_seed(0), **given)
    except Exception:  # a pipeline may raise anything; whoever records it says so
        return timestep
    found = {f"{n}.{a}": a for n, of_network in calls.items() for a in _changing(of_network)}
    if len(set(found.values())) > 1:
        raise TFMQError(
            f"timestep: no network takes a {timestep!r}, and {' and '.join(found)} could be it; name it with timestep=..."
        )
    if found:
        log.info("calibration: the timestep is %s, which changes from call to call", next(iter(found)))
    return next(iter(found.values()), timestep)


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(recorded(module)) for name, module in modules.items()}


def _changing(calls: list[Call]) -> list[str]:
    """Return the arguments that are one number in each call, for all samples, and another one in the next."""
    if len(calls) < 2:
        return []
    numbers = {n: [_number(call.get(n)) for call in calls] for n in calls[0]}
    return [n for n, x in numbers.items() if None not in x and all(a != b for a, b in itertools.pairwise(x))]


def _number(value: Any) -> float | None:
    if (
        isinstance(value, Tensor)
        and value.dim() <= 1
        and value.numel()
        and bool((value == value.reshape(-1)[0]).all())
    ):
        return float(value.reshape(-1)[0])
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
