"""How a pipeline calls its denoiser: found out before anything is recorded."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.drop_in import uncounted
from tfmq_fx.artefact.interface import PERTURBED
from tfmq_fx.artefact.plain import holds_tensors, is_object
from tfmq_fx.base.arguments import nested
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import update_with_tensors
from tfmq_fx.base.rounding import within_rounding
from tfmq_fx.base.row_lists import RowLists
from tfmq_fx.base.second_rows import rows_of_call
from tfmq_fx.base.stand_ins import StandIn
from tfmq_fx.calibration.calls import (
    Call,
    Constants,
    Flat,
    Leaves,
    UnlikeCallsError,
    call_leaves,
    computing,
    defaults_of,
    finite,
    first_overflow,
    flat,
    overflow_words,
    recorded,
    repeated,
    same,
)
from tfmq_fx.calibration.guidance import Unguided, conditional_rows, conditions, without_guidance
from tfmq_fx.calibration.perturbed import Perturbation, watched
from tfmq_fx.calibration.pipelines import call_pipeline, few_steps, given_steps, whole_lists
from tfmq_fx.calibration.shapes import Shapes, repeats
from tfmq_fx.calibration.trials import Trials, completed, rows_in, sample_in, tensor_of

log = logging.getLogger(__name__)

MOST_SEED = 2**40  # of a recording: each sample's own is some 10**6 times as large, and torch's have 64 bits
FORMAT = 7  # of recordings in a cache; increased when the same arguments give other rows


@dataclass(frozen=True)
class Preview:
    """What a run that computes little shows."""

    size: int  # the number of samples
    calls: list[Leaves]
    perturbation: Perturbation | None  # what the pipeline sets in its network meanwhile
    lists: RowLists | None  # what the network takes as lists of rows


@dataclass(frozen=True)
class Session:
    """The settings of one recording. `probe` finds out how the pipeline calls its denoiser.

    The fields are the arguments of `CalibrationSet.record`; network: the pipeline's denoiser.
    stand_ins: what stands for tensors that some calls leave out. moving: the names of tensors without rows that are not the same
        in all calls. `learned` finds both. idle: the names of objects that are left out, by `without_objects`.
    """

    pipe: Any
    network: nn.Module
    timestep: str
    num_samples: int
    num_inference_steps: int | None
    seed: int
    batch_size: int
    pipe_kwargs: dict[str, Any] = field(default_factory=dict)
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)
    moving: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()

    @cached_property
    def whole(self) -> frozenset[str]:
        """Return the names of the pipeline's list arguments that are not one value per sample."""
        return whole_lists(self.pipe, self._given(self.num_inference_steps))

    def _given(self, steps: int | None) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for so many steps."""
        return {**self.pipe_kwargs, **given_steps(steps)}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Return the defaults of the denoiser's arguments."""
        return defaults_of(self.network)

    @cached_property
    def preview(self) -> Preview:
        """Return what a whole run for one batch shows that computes little. Its last error is left to the other runs.

        What the pipeline does in some steps only is seen before hours of sampling. A pipeline that cannot draw a batch at
        once, but one sample, draws one at a time from here on.
        """
        size = min(self.batch_size, self.num_samples)
        found, why = self._previewed(size)
        if why and size > 1:
            alone, other = self._previewed(1)
            if not other:
                log.warning(
                    "calibration: the pipeline cannot draw %d samples at once (%s), so it draws one at a time",
                    size,
                    why,
                )
                return alone
        return found

    def _previewed(self, size: int) -> tuple[Preview, str]:
        """Return what a run for this number of samples shows, and why it cannot be recorded, or ""."""
        with repeated(self.network), watched(self.network) as watch:
            found, error = self._run(0, size, self._given(self.num_inference_steps))
            watch.require_no_store()
        if error is not None:
            watch.restore()
        with computing(self.network):
            lists = rows_of_call(self.network, found[0], self.timestep) if found else None
        calls = self._of_tensors(found, lists)
        try:
            if error is not None:
                raise error
            for call in calls:
                one = flat(call)
                self.rows(call, Shapes.of(one, self.size_of(one), apart=self._apart_from_rows))
        except Exception as reason:  # a pipeline may raise anything
            error = reason
        why = "" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
        return Preview(size, calls, watch.perturbation(), lists), why

    @property
    def together(self) -> int:
        """Return the number of samples that are drawn at once."""
        return min(self.batch_size, self.preview.size)

    def run(
        self,
        first: int,
        size: int,
        steps: int | None,
        *,
        changes: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> tuple[list[Call], Exception | None]:
        """Run the pipeline for samples first .. first + size - 1. Return its calls, and the error that ended it.

        changes: override `pipe_kwargs`. seed: added to the session's.

        Raises TFMQError if the pipeline sets anything in its network that it has not set in `preview`.
        """
        perturbation = self.preview.perturbation
        with watched(self.network) as watch:
            found, error = self._run(first, size, {**self._given(steps), **(changes or {})}, seed=seed)
        if error is not None:
            watch.restore()
        if not changes:
            watch.require({} if perturbation is None else perturbation.objects)
        if perturbation is not None and not changes:
            for call, own in zip(found, watch.changes, strict=True):
                size = sum(self.size_of(flat(c)) for c in self._of_tensors([call], self.preview.lists))
                call[PERTURBED] = perturbation.rows(size) if own else torch.zeros(size, dtype=torch.bool)
        return found, error

    def _run(
        self, first: int, size: int, given: Mapping[str, Any], *, seed: int = 0
    ) -> tuple[list[Call], Exception | None]:
        whole = self.whole  # may run the pipeline, which must not be recorded
        generator = torch.Generator().manual_seed((self.seed + seed) * 1_000_003 + first)
        with recorded(self.network) as found, torch.random.fork_rng(devices=()):
            torch.manual_seed(generator.initial_seed())  # some pipelines draw from this one, too
            try:
                call_pipeline(self.pipe, size, first=first, whole=whole, generator=generator, **given)
            except Exception as error:  # a pipeline may raise anything
                return found, error
        return found, None

    def batch(self, first: int, unguided: Unguided | None) -> tuple[list[Leaves], list[bool]]:
        """Return the calls that draw the batch which starts at sample `first`, and which of their rows have the condition.

        unguided: as `probe` returns it.
        """
        size = min(self.together, self.num_samples - first)
        plain = None if unguided is None else self.short(size, first=first, changes=unguided.changes)
        found, error = self.run(first, size, self.num_inference_steps)
        self._require_finite(found)
        if error is not None:
            raise error
        calls = self._leaves(found)
        if unguided is None or not plain:
            return calls, [True] * sum(self.size_of(flat(c)) for c in calls)
        start = flat(plain[0])
        # Rows of several sizes in the first call are several calls, of one timestep.
        firsts = [start] if self.preview.lists is None else [
            c for c in map(flat, plain) if same(c[self.timestep].unique(), start[self.timestep].unique())
        ]  # fmt: skip
        expected = [{n: x for n, x in c.items() if n in unguided.conditions} for c in firsts]
        return calls, self._marks([flat(c) for c in calls], expected)

    def _require_finite(self, calls: list[Call]) -> None:
        """Raise TFMQError if the network's values overflow in a call: then the samples are NaN in the next one."""
        wrong = next((i for i, call in enumerate(calls) if not finite(call)), 0)
        if not wrong:
            return
        with torch.no_grad():
            layer = first_overflow(self.network, calls[wrong - 1])
        if layer is not None:
            dtype = next((p.dtype for p in self.network.parameters()), torch.float32)
            raise TFMQError(overflow_words(layer, dtype, f"call {wrong}"))

    def short(
        self, size: int, *, first: int = 0, changes: Mapping[str, float] | None = None, seed: int = 0
    ) -> list[Leaves]:
        """Return the calls that draw samples first .. first + size - 1 in as few steps as the arguments allow.

        changes, seed: see `run`. An error after a call is raised only without them: what a user's callback
        does need not fit other arguments.
        """
        for steps in few_steps(self.num_inference_steps):
            with uncounted():
                found, error = self.run(first, size, steps, changes=changes, seed=seed)
            # With too few steps, the pipeline may have none to take. Then it makes no call, and may fail.
            if error is not None and not changes and (found or steps == self.num_inference_steps):
                raise error
            if found:
                break
        return self._leaves(found) if found or not changes else []

    def _leaves(self, calls: list[Call]) -> list[Leaves]:
        if not calls:
            raise TFMQError(f"calibration: the pipeline never called {type(self.network).__name__}.")
        return self._of_tensors(calls, self.preview.lists)

    def _of_tensors(self, calls: list[Call], lists: RowLists | None) -> list[Leaves]:
        """Return the leaves of calls, with tensors (N, ...) for lists of rows. A call with rows of several sizes is several calls."""
        parts = calls if lists is None else [part for call in calls for part in lists.parts(call)]
        return [
            completed(
                {n: x for n, x in call_leaves(call, self.defaults).items() if n not in self.idle},
                self.stand_ins,
                self.timestep,
            )
            for call in parts
        ]

    def without_objects(self) -> Session:
        """Return the session that leaves out objects without tensors, of classes of the pipeline's own, with which the network does nothing.

        Such as a cache of keys and values that is for calls with pictures alone (GLM-Image).
        """
        call = next(iter(self.preview.calls), {})
        objects = [
            n for n, (path, x) in call.items() if len(path) == 1 and is_object(x) and not holds_tensors(x)
        ]
        if not objects or (expected := self.trials.computed(nested(dict(call.values())))) is None:
            return self
        made = self.trials.computed(nested({path: x for n, (path, x) in call.items() if n not in objects}))
        same_without = made is not None and within_rounding(made, expected)
        return replace(self, idle=frozenset(objects)) if same_without else self

    def learned(self, error: UnlikeCallsError) -> Session:
        """Return the session that records what made calls unlike: a tensor that some leave out, or one without rows.

        Raises the error again if the network does not compute the same with anything in place of a tensor that is left out, or
        takes another tensor for other rows.
        """
        name, given = error.name, [call for call in error.calls if tensor_of(call, error.name) is not None]
        without = [call for call in error.calls if tensor_of(call, error.name) is None]
        if name in {*self.stand_ins, *self.moving}:
            raise error
        if given and without and (found := self.trials.stand_in(name, given[0], without[0])) is not None:
            log.info("calibration: %r is %d everywhere where the pipeline leaves it out", name, found.value)
            return replace(self, stand_ins={**self.stand_ins, name: found})
        if given and not without and all(self.trials.is_of_the_call(name, call) for call in given):
            return replace(self, moving=self.moving | {name})
        raise error

    @property
    def _apart_from_rows(self) -> frozenset[str]:
        """Return the names of the tensors of which their shapes do not tell if they have rows."""
        return self.moving | {self.timestep}

    def even(self) -> frozenset[str]:
        """Return the tensors whose rows have one size: the timestep and the noisy samples, which are as large as the outputs."""
        return frozenset({sample_in(flat(self.preview.calls[0]), self.timestep), self.timestep})

    def moving_of(self, call: Leaves) -> dict[str, Tensor]:
        """Return the tensors without rows of a call that are not the same in all calls."""
        return {n: x for n, (_, x) in call.items() if n in self.moving}

    def size_of(self, call: Flat) -> int:
        """Return the number of rows of a call. See `rows_in`."""
        return rows_in(call, self.timestep)

    @cached_property
    def trials(self) -> Trials:
        """Return what calls the network to see what its arguments are."""
        return Trials(self.network, self.timestep, self.preview.lists, self.moving)

    def probe(self) -> tuple[Shapes, Unguided | None]:
        """Find the tensors without rows, and how to run without guidance, None if there is no guidance.

        The first run takes few steps, for a number of samples other than the recording's batch size, if the pipeline can:
        tensors that do not scale with it have no rows. Other runs are the same without guidance, and have fewer rows if it was on.
        """
        size = 2 if self.together == 1 and self._takes_two() else 1
        found = self.short(size)
        calls = [flat(call) for call in found]
        rows = self.size_of(calls[0])
        shapes = Shapes.of(calls[0], rows, apart=self._apart_from_rows)
        seen = [*found, *self.preview.calls]
        if len(seen) <= 2:  # of one step
            seen += self.short(size, seed=1)
        folded = shapes.may_be_folded([flat(call) for call in seen], self.size_of)
        if folded and self.trials.apart(found[0], shapes, folded):
            shapes.folded = folded
        for name in self.trials.of_all_rows(seen, shapes):
            shapes.shared[name] = shapes.likely.pop(name)
        shared = shapes.shared = {n: x for n, x in shapes.shared.items() if n not in shapes.folded}
        for made in (found, self.preview.calls):
            self.constants_of(made, shared)
        total = sum(self.size_of(c) for c in calls)
        for changes in without_guidance(inspect.signature(self.pipe.__call__).parameters, self.pipe_kwargs):
            plain = [flat(c) for c in self.short(size, changes=changes)]
            if plain and sum(self.size_of(c) for c in plain) < total:
                plain += [flat(c) for c in self.short(size, changes=changes, seed=1)]
                _, *names = (n for n, x in plain[0].items() if isinstance(x, Tensor) and n != self.timestep)
                found_in = conditions(
                    plain,
                    [n for n in names if n not in {*shared, *shapes.repeats, *shapes.folded, *self.moving}],
                )
                return shapes, Unguided(changes=changes, conditions=found_in)
        return shapes, None

    def constants_of(self, calls: Sequence[Leaves], shared: Mapping[str, torch.Size]) -> Constants:
        """Return the constants of the calls of one run. shared: the tensors without rows."""
        constants = Constants(self.defaults)
        for call in calls:
            self.take_constants(constants, call, shared)
        return constants

    def take_constants(self, constants: Constants, call: Leaves, shared: Mapping[str, torch.Size]) -> int:
        """Add the constants of a call, and return its kind. See `Constants.take`."""
        return constants.take(call, self.row_names(call, shared) | self.moving)

    def _takes_two(self) -> bool:
        """Return True if the pipeline can draw two samples at once, and its network gets more rows for them than for one."""
        two, why = self._previewed(2)
        return not why and self.size_of(flat(two.calls[0])) > self.size_of(flat(self.preview.calls[0]))

    def misfit(self, shapes: Shapes) -> str:
        """Return why a batch has no rows of these shapes, which are those for another number of samples; "" if it has.

        Raises UnlikeCallsError for a tensor that can be `learned`.
        """
        shapes, calls = deepcopy(shapes), self.preview.calls
        try:
            shapes.see([flat(c) for c in calls], [self.size_of(flat(c)) for c in calls])
            for call in calls:
                self.rows(call, shapes)
        except UnlikeCallsError as error:
            try:
                self.learned(error)
            except UnlikeCallsError:
                return str(error)
            raise
        except TFMQError as error:
            return str(error)
        return ""

    def row_names(self, call: Leaves, shared: Mapping[str, torch.Size]) -> frozenset[str]:
        """Return the names of a call's arguments that have rows. shared: the tensors that have none.

        Raises UnlikeCallsError for a tensor without rows whose shape is another one in another call.
        """
        tensors = {n: x for n, (_, x) in call.items() if isinstance(x, Tensor) and n not in self.moving}
        for name, shape in shared.items():
            if name in tensors and tensors[name].shape != shape:
                raise UnlikeCallsError(
                    name,
                    (call,),
                    f"calibration: {name!r} has shape {tuple(tensors[name].shape)} in one call of the network, and {tuple(shape)} in "
                    "one for another number of samples; only tensors with one row for each sample, or the same for all samples, "
                    "can be recorded.",
                )
        return frozenset((tensors.keys() - shared.keys()) | ({self.timestep} & call.keys()))

    def rows(self, call: Leaves, shapes: Shapes) -> dict[str, Tensor]:
        """Return the rows of a call's tensors that have some, and of its timestep."""
        names, size, found = self.row_names(call, shapes.shared), self.size_of(flat(call)), {}
        for name, (_, given) in call.items():
            if name not in names:
                continue
            value = torch.as_tensor(given)
            if name == self.timestep:
                found[name] = _timesteps(name, value, size)
                continue
            if name in shapes.repeats and repeats(value, size) == shapes.repeats[name]:
                value = value[:: shapes.repeats[name]]
            if name in shapes.folded and value.shape[0] % size == 0:
                value = value.unflatten(0, (size, -1))
            if value.dim() and value.shape[0] == 1:
                value = value.expand(size, *value.shape[1:])
            if not value.dim() or value.shape[0] != size:
                raise TFMQError(
                    f"calibration: {name!r} has shape {tuple(value.shape)} in a call of {size} rows; its first dimension must be "
                    "the number of rows."
                )
            found[name] = value
        return found

    def settle(self, call: Leaves, shapes: Shapes) -> None:
        """Give each row of a call a copy of what is (1, ...) and the same in all calls, if the network does not take it once beside them.

        A pipeline may give its network everything but the noisy samples once; of that, what differs from call to call has rows.
        """
        ones = {n for n, (_, x) in call.items() if isinstance(x, Tensor) and x.shape[:1] == (1,)} - {
            self.timestep
        }
        once = ones & shapes.shared.keys()
        if not once or once == ones or self.preview.lists is not None or self.size_of(flat(call)) == 1:
            return
        other = replace(shapes, shared={n: s for n, s in shapes.shared.items() if n not in once})
        if self._of_rows(call, shapes) is None and self._of_rows(call, other) is not None:
            shapes.shared = other.shared

    def _of_rows(self, call: Leaves, shapes: Shapes) -> Tensor | None:
        """Return what the network computes of a call's rows; None if it fails."""
        rows = self.rows(call, shapes)
        return self.trials.computed(nested({path: rows.get(n, x) for n, (path, x) in call.items()}))

    def _marks(self, calls: list[Flat], expected: Sequence[Mapping[str, Tensor]]) -> list[bool]:
        """Return for each row of the calls whether it has one of the conditions. expected: see `conditional_rows`."""
        sizes = [self.size_of(call) for call in calls]
        marks: list[bool] = (
            torch.stack([conditional_rows(calls, sizes, one) for one in expected]).any(0).tolist()
        )
        if any(marks) and not all(marks):
            return marks
        log.warning(
            "calibration: cannot tell conditional from unconditional rows; all are treated as conditional"
        )
        return [True] * len(marks)

    def key(self, **more: Any) -> str:
        """Return a hash of everything that the rows depend on: weights, scheduler, arguments, seeds, versions.

        more: further values to hash, by name.
        """
        import diffusers

        pipe = self.pipe
        plain: list[Any] = [FORMAT, type(pipe).__name__, torch.__version__, diffusers.__version__, more]
        plain += [self.timestep, self.num_samples, self.num_inference_steps, self.seed, self.batch_size]
        values, structure = pytree.tree_flatten(self.pipe_kwargs)
        # Words would leave out most of an array's values, and have the address of a picture.
        tensors = {f"argument {i}": _values(x) for i, x in enumerate(values) if _is_array(x)}
        plain += [str(structure), [None if _is_array(x) else x for x in values]]
        for name, module in pipe.components.items():
            if isinstance(module, nn.Module):
                tensors |= {f"{name}.{n}": x for n, x in module.state_dict().items()}
            else:
                plain.append([name, type(module).__name__, str(module)])
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
        update_with_tensors(digest, sorted(tensors.items()))
        return digest.hexdigest()[:32]


def _timesteps(name: str, t: Tensor, size: int) -> Tensor:
    """Return a call's timestep as one value per row, (size,), or one for each token or frame of it, (size, tokens)."""
    if not t.numel() or (t.dim() and size % len(t)):
        raise TFMQError(
            f"calibration: the timestep {name!r} has shape {tuple(t.shape)} in a call of {size} rows; it must have one row for each "
            "row of the call, or one for all."
        )
    rows = t.reshape(1) if not t.dim() else t
    return rows.repeat(size // len(rows), *[1] * (rows.dim() - 1))


def _is_array(value: Any) -> bool:
    """Return True for tensors, and for numpy arrays and PIL pictures."""
    return isinstance(value, Tensor) or hasattr(value, "__array_interface__")


def _values(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
