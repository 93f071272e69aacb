"""Record a pipeline's calls of its denoiser: one trajectory per sample."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.base.arguments import Path as ArgumentPath
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_folder, update_with_tensors
from tfmq_fx.base.parallel import Ranks, workers
from tfmq_fx.base.progress import track
from tfmq_fx.calibration.calls import (
    Call,
    Constants,
    Flat,
    Leaves,
    call_leaves,
    defaults_of,
    finite,
    first_overflow,
    overflow_words,
    recorded,
)
from tfmq_fx.calibration.pipelines import call_pipeline, few_steps, whole_lists
from tfmq_fx.calibration.rows import INDEX, Recording, Sink, read_recording

log = logging.getLogger(__name__)


FORMAT = 2  # of recordings in a cache; increased when the same arguments give other rows
MAX_MEMORY = 4 * 2**30  # bytes; larger recordings go to memory-mapped files


# A pipeline uses guidance if one of these is above 1 (Ho & Salimans 2022; for distilled networks, the second).
GUIDANCE = ("guidance_scale", "true_cfg_scale")


@dataclass(frozen=True)
class Session:
    """The settings of one recording. `probe` finds out how the pipeline calls its denoiser.

    The fields are the arguments of `CalibrationSet.record`; network: the pipeline's denoiser.
    """

    pipe: Any
    network: nn.Module
    timestep: str
    num_samples: int
    num_inference_steps: int
    seed: int
    batch_size: int
    pipe_kwargs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def whole(self) -> frozenset[str]:
        """Return the names of the pipeline's list arguments that are not one value per sample."""
        return whole_lists(self.pipe, {**self.pipe_kwargs, "num_inference_steps": self.num_inference_steps})

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Return the defaults of the denoiser's arguments."""
        return defaults_of(self.network)

    def run(self, first: int, size: int, steps: int, **changes: Any) -> tuple[list[Call], Exception | None]:
        """Run the pipeline for samples first .. first + size - 1. Return its calls, and the error that ended it.

        changes: override `pipe_kwargs`.
        """
        whole = self.whole  # may run the pipeline, which must not be recorded
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
        with recorded(self.network) as found:
            try:
                call_pipeline(
                    self.pipe, size, first=first, whole=whole, num_inference_steps=steps, generator=generator,
                    **{**self.pipe_kwargs, **changes},
                )  # fmt: skip
            except Exception as error:  # a pipeline may raise anything
                return found, error
        return found, None

    def batch(self, first: int) -> list[Leaves]:
        """Return the calls that draw the batch which starts at sample `first`, as leaves by flat name."""
        size = min(self.batch_size, self.num_samples - first)
        found, error = self.run(first, size, self.num_inference_steps)
        self._require_finite(found)
        if error is not None:
            raise error
        return self._leaves(found)

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

    def short(self, size: int, **changes: Any) -> list[Leaves]:
        """Return the calls that draw samples 0 .. size - 1 in as few steps as the pipeline's arguments allow.

        changes: override `pipe_kwargs`.
        """
        for steps in few_steps(self.num_inference_steps):
            found, error = self.run(0, size, steps, **changes)
            # With too few steps, the pipeline may have none to take. Then it makes no call, and may fail.
            if error is not None and (found or steps == self.num_inference_steps):
                raise error
            if found:
                break
        return self._leaves(found)

    def _leaves(self, calls: list[Call]) -> list[Leaves]:
        if not calls:
            raise TFMQError(f"calibration: the pipeline never called {type(self.network).__name__}.")
        return [call_leaves(call, self.defaults) for call in calls]

    def size_of(self, call: Flat) -> int:
        """Return the number of rows of a call: that of its first tensor other than the timestep, the noisy sample."""
        for name, value in call.items():
            if isinstance(value, Tensor) and name != self.timestep and value.dim():
                return value.shape[0]
        raise TFMQError(
            f"calibration: a call of {type(self.network).__name__} has no tensor but {self.timestep!r}."
        )

    def probe(self) -> tuple[frozenset[str], list[list[bool]]]:
        """Find the tensors without rows, and which rows are conditional.

        Returns the names of tensors that have no rows, such as position ids, and a pattern: for each call, and each
        part of its batch, True if it has the condition. The pattern is [[False, True]] if every call has the
        unconditional rows first, and [[True], [False]] if calls alternate.

        The first run takes few steps, for a number of samples other than the recording's batch size: tensors that
        do not scale with it have no rows. The second run is the same without guidance: rows that do not occur in
        it are unconditional.
        """
        size = 2 if min(self.batch_size, self.num_samples) == 1 else 1
        found = self.short(size)
        calls = [_flat(call) for call in found]
        rows = self.size_of(calls[0])
        shared = frozenset(
            n for n, x in calls[0].items()
            if n != self.timestep and isinstance(x, Tensor) and (not x.dim() or x.shape[0] != rows)
        )  # fmt: skip
        constants = Constants(self.defaults)
        for call in found:
            constants.take(call, self.row_names(call, shared))
        takes = inspect.signature(self.pipe.__call__).parameters
        total = sum(self.size_of(c) for c in calls)
        for name in GUIDANCE:
            plain = [_flat(c) for c in self.short(size, **{name: 1.0})] if name in takes else calls
            if sum(self.size_of(c) for c in plain) < total:
                return shared, self._pattern(calls, plain[0], size, shared)
        return shared, [[True]]

    def row_names(self, call: Leaves, shared: frozenset[str]) -> frozenset[str]:
        """Return the names of a call's arguments that have rows. shared: the tensors that have none."""
        tensors = {n for n, (_, x) in call.items() if isinstance(x, Tensor) and n not in shared}
        return frozenset(tensors | ({self.timestep} & call.keys()))

    def _pattern(self, calls: list[Flat], plain: Flat, size: int, shared: frozenset[str]) -> list[list[bool]]:
        first = next(n for n, x in plain.items() if isinstance(x, Tensor) and n != self.timestep)
        names = [
            n for n, x in plain.items() if isinstance(x, Tensor) and n not in (first, self.timestep, *shared)
        ]
        period = calls if self.size_of(calls[0]) == size else calls[:1]

        def part(call: Flat, i: int) -> bool:
            rows = slice(i * size, (i + 1) * size)
            return all(n in call and _near(call[n][rows], plain[n]) for n in names)

        found = [[part(call, i) for i in range(self.size_of(call) // size)] for call in period[:2]]
        flat = [mark for marks in found for mark in marks]
        if all(flat) or not any(flat):
            log.warning(
                "calibration: cannot tell conditional from unconditional rows; all are treated as conditional"
            )
            return [[True]]
        return found

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


def record(session: Session, *, deterministic: bool, cache: Path | None, max_memory: float) -> Recording:
    """Run the session, or read the recording of an equal session from `cache`.

    max_memory: bytes; larger recordings are memory-mapped files.
    """
    if cache is None:
        # On Linux, a mapped file stays readable after it is deleted.
        with tempfile.TemporaryDirectory(prefix="tfmq-rows-") as temporary:
            return _record(session, Path(temporary), deterministic=deterministic, limit=max_memory)
    folder = cache / session.key(deterministic=deterministic)
    ranks = Ranks()
    if not all(ranks.gather((folder / INDEX).is_file())):
        if ranks.rank == 0:
            replace_folder(folder, lambda part: _write(session, part, deterministic=deterministic))
        else:
            _record(session, folder, deterministic=deterministic, limit=float("inf"))
        ranks.gather(None)  # the other ranks wait for the folder
    return read_recording(folder)


def _record(session: Session, folder: Path, *, deterministic: bool, limit: float) -> Recording:
    ranks = Ranks()
    starts = ranks.share(range(0, session.num_samples, session.batch_size))
    sink, marks = Sink(folder, limit), list[bool]()
    paths, constants = dict[str, ArgumentPath](), Constants(session.defaults)

    def take(batch: list[Leaves]) -> None:
        for call in batch:
            paths.update({n: path for n, (path, _) in call.items()})
            names = session.row_names(call, shared)
            constants.take(call, names)
            sink.append(_rows(session, _flat(call), names))
        marks.extend(_marks(session, [_flat(call) for call in batch], pattern))

    with workers(1) if deterministic else nullcontext():
        shared, pattern = session.probe()
        found = []
        for start in track(starts, "recording trajectories"):
            if ranks.size > 1:
                found.append(session.batch(start))
            else:
                take(session.batch(start))
    if ranks.size > 1:
        # The batches are dealt to the ranks in turn, so the first ranks may have one more.
        for batches in zip_longest(*ranks.gather(found)):
            for batch in batches:
                if batch is not None:
                    take(batch)
    return Recording(
        rows=sink.finish(), constants=constants.values, paths=paths, conditional=torch.tensor(marks)
    )


def _flat(call: Leaves) -> Flat:
    return {n: value for n, (_, value) in call.items()}


def _rows(session: Session, call: Flat, names: frozenset[str]) -> dict[str, Tensor]:
    """Return the rows of a call. names: its arguments that have rows."""
    size, rows = session.size_of(call), {}
    for name in (n for n in call if n in names):
        value = torch.as_tensor(call[name])
        if name == session.timestep:
            rows[name] = _timesteps(name, value, size)
            continue
        if value.dim() and value.shape[0] == 1:
            value = value.expand(size, *value.shape[1:])
        if not value.dim() or value.shape[0] != size:
            raise TFMQError(
                f"calibration: {name!r} has shape {tuple(value.shape)} in a call of {size} rows; its first dimension must be "
                "the number of rows."
            )
        rows[name] = value
    return rows


def _timesteps(name: str, t: Tensor, size: int) -> Tensor:
    """Return a call's timestep as one value per row, (size,)."""
    if t.dim() > 1 or (t.dim() and size % max(len(t), 1)):
        raise TFMQError(
            f"calibration: the timestep {name!r} has shape {tuple(t.shape)} in a call of {size} rows; only one timestep for each "
            "row, or one for all, can be recorded."
        )
    return t.reshape(-1).repeat(size // t.numel())


def _near(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors differ by no more than another order of sums, at another batch size, makes of them."""
    if a.shape != b.shape or not b.is_floating_point() or not b.numel():
        return torch.equal(a, b)
    few = max(1e-4, 8 * torch.finfo(b.dtype).eps)  # in half precision, a few of its last bits
    return bool((a - b).abs().max() <= few * b.abs().max())


def _is_array(value: Any) -> bool:
    """Return True for tensors, and for numpy arrays and PIL pictures."""
    return isinstance(value, Tensor) or hasattr(value, "__array_interface__")


def _values(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))


def _marks(session: Session, calls: list[Flat], pattern: list[list[bool]]) -> list[bool]:
    found = []
    for i, call in enumerate(calls):
        parts = pattern[i % len(pattern)]
        size = session.size_of(call)
        found += [mark for mark in parts for _ in range(size // len(parts))]
    return found


def _write(session: Session, folder: Path, *, deterministic: bool) -> None:
    found = _record(session, folder, deterministic=deterministic, limit=-1)
    tensors = {n: x for n, x in found.constants.items() if isinstance(x, Tensor)}
    plain = {n: x for n, x in found.constants.items() if n not in tensors}
    index = {
        "rows": [[n, str(x.dtype).removeprefix("torch."), list(x.shape)] for n, x in found.rows.items()],
        "constants": plain,
        "shared": {n: [str(x.dtype).removeprefix("torch."), x.tolist()] for n, x in tensors.items()},
        "paths": {n: list(path) for n, path in found.paths.items()},
        "conditional": found.conditional.int().tolist(),
    }
    try:
        text = json.dumps(index)
    except TypeError as error:
        raise TFMQError(
            f"calibration: a call has an argument that cannot be cached ({error}); record without cache=."
        ) from error
    (folder / INDEX).write_text(text)
