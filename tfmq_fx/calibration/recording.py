"""Record a pipeline's calls of its denoiser: one trajectory per sample."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.base.arguments import Path as ArgumentPath
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_folder, update_with_tensors
from tfmq_fx.base.parallel import Ranks, workers
from tfmq_fx.base.progress import track
from tfmq_fx.calibration.pipelines import run_pipeline
from tfmq_fx.calibration.rows import INDEX, Recording, Sink, read_recording

log = logging.getLogger(__name__)


MAX_MEMORY = 4 * 2**30  # bytes; larger recordings go to memory-mapped files


# A pipeline uses guidance if one of these is above 1 (Ho & Salimans 2022; for distilled networks, the second).
GUIDANCE = ("guidance_scale", "true_cfg_scale")


Call = dict[str, Any]  # a denoiser's arguments by flat name, tensors and plain values


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Call]]:
    """Record the calls of `network`, in order, while the context is open."""
    if isinstance(network, DropIn):
        raise TFMQError(
            "calibration: the pipeline's denoiser is already quantized; record with the float network."
        )
    calls: list[Call] = []
    signature = inspect.signature(network.forward)

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(signature.bind(*args, **kwargs).arguments))

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


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

    def calls(self, first: int, size: int, steps: int, **changes: Any) -> list[Call]:
        """Return the calls that draw samples first .. first + size - 1.

        changes: override `pipe_kwargs`.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
        with recorded(self.network) as found:
            run_pipeline(
                self.pipe, size, first=first, num_inference_steps=steps, generator=generator,
                **{**self.pipe_kwargs, **changes},
            )  # fmt: skip
        if not found:
            raise TFMQError(f"calibration: the pipeline never called {type(self.network).__name__}.")
        return found

    def batch(self, first: int) -> list[dict[str, tuple[ArgumentPath, Any]]]:
        """Return the calls that draw the batch which starts at sample `first`, as leaves by flat name."""
        size = min(self.batch_size, self.num_samples - first)
        return [leaves(call) for call in self.calls(first, size, self.num_inference_steps)]

    def size_of(self, call: Call) -> int:
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

        The first run takes two steps, for a number of samples other than the recording's batch size: tensors that
        do not scale with it have no rows. The second run takes two steps without guidance: rows that do not
        occur in it are unconditional.
        """
        size = 2 if min(self.batch_size, self.num_samples) == 1 else 1

        def run(**changes: Any) -> list[Call]:
            calls = self.calls(0, size, 2, **changes)
            return [{n: leaf for n, (_, leaf) in leaves(call).items()} for call in calls]

        calls = run()
        rows = self.size_of(calls[0])
        shared = frozenset(
            n for n, x in calls[0].items()
            if n != self.timestep and isinstance(x, Tensor) and (not x.dim() or x.shape[0] != rows)
        )  # fmt: skip
        takes = inspect.signature(self.pipe.__call__).parameters
        total = sum(self.size_of(c) for c in calls)
        for name in GUIDANCE:
            plain = run(**{name: 1.0}) if name in takes else calls
            if sum(self.size_of(c) for c in plain) < total:
                return shared, self._pattern(calls, plain[0], size, shared)
        return shared, [[True]]

    def _pattern(self, calls: list[Call], plain: Call, size: int, shared: frozenset[str]) -> list[list[bool]]:
        first = next(n for n, x in plain.items() if isinstance(x, Tensor) and n != self.timestep)
        names = [
            n for n, x in plain.items() if isinstance(x, Tensor) and n not in (first, self.timestep, *shared)
        ]
        period = calls if self.size_of(calls[0]) == size else calls[:1]

        def part(call: Call, i: int) -> bool:
            rows = slice(i * size, (i + 1) * size)
            return all(
                call[n][rows].shape == plain[n].shape and torch.allclose(call[n][rows], plain[n])
                for n in names
            )

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
        plain: list[Any] = [type(pipe).__name__, torch.__version__, diffusers.__version__, more]
        plain += [self.timestep, self.num_samples, self.num_inference_steps, self.seed, self.batch_size]
        tensors = {n: x for n, x in self.pipe_kwargs.items() if isinstance(x, Tensor)}
        plain.append({n: v for n, v in self.pipe_kwargs.items() if n not in tensors})
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
    paths: dict[str, ArgumentPath] = {}
    constants: dict[str, Any] = {}

    def take(batch: list[dict[str, tuple[ArgumentPath, Any]]]) -> None:
        calls = [{n: leaf for n, (_, leaf) in call.items()} for call in batch]
        paths.update({n: path for n, (path, _) in batch[0].items()})
        for call in calls:
            _append(session, sink, call, shared, constants)
        marks.extend(_marks(session, calls, pattern))

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
    return Recording(rows=sink.finish(), constants=constants, paths=paths, conditional=torch.tensor(marks))


def _append(
    session: Session, sink: Sink, call: Call, shared: frozenset[str], constants: dict[str, Any]
) -> None:
    size, rows = session.size_of(call), {}
    for name, value in call.items():
        if name == session.timestep:
            t = torch.as_tensor(value)
            rows[name] = t.expand(size) if t.dim() == 0 else t.repeat(size // len(t))
        elif isinstance(value, Tensor) and name not in shared:
            if value.dim() and value.shape[0] == 1:
                value = value.expand(size, *value.shape[1:])
            if not value.dim() or value.shape[0] != size:
                raise TFMQError(
                    f"calibration: {name!r} has shape {tuple(value.shape)} in a call of {size} rows; its first dimension must be "
                    "the number of rows."
                )
            rows[name] = value
        elif name not in constants:
            constants[name] = value
        elif not _same(constants[name], value):
            raise TFMQError(
                f"calibration: {name!r} has no rows, but changes between calls ({constants[name]!r}, {value!r})."
            )
    sink.append(rows)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _marks(session: Session, calls: list[Call], pattern: list[list[bool]]) -> list[bool]:
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
