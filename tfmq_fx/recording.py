"""A pipeline's own calls of its denoiser, kept as rows: one trajectory per sample, in memory or memory-mapped."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.arguments import Path as ArgumentPath
from tfmq_fx.arguments import leaves
from tfmq_fx.arithmetic import raw_bytes
from tfmq_fx.errors import TFMQError
from tfmq_fx.model import DropIn
from tfmq_fx.parallel import Ranks, workers
from tfmq_fx.progress import track
from tfmq_fx.resume import update_with_tensors
from tfmq_fx.saving import replace_folder

log = logging.getLogger(__name__)
MAX_MEMORY = 4 * 2**30  # bytes of rows; more go to memory-mapped files
INDEX = "rows.json"
SCHEDULES = ("timesteps", "sigmas")  # lists of a pipeline's arguments that are not one value per sample
# A pipeline guides when one of these is above 1 (Ho & Salimans 2022; for distilled networks the second one).
GUIDANCE = ("guidance_scale", "true_cfg_scale")
Call = dict[str, Any]  # a denoiser's arguments by flat name, tensors and plain values


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a network was called with. Rows are (N, ...); shared tensors are the same in every call."""

    rows: dict[str, Tensor]
    constants: dict[str, Any]  # plain values, and shared tensors
    paths: dict[str, ArgumentPath]
    conditional: Tensor  # (N,) bool: False for a guided pipeline's rows without the condition


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


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Call]]:
    """The calls of `network` while this lasts, in their order."""
    if isinstance(network, DropIn):
        raise TFMQError(
            "calibration: the pipeline's denoiser is quantized already; record with the float network."
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
    """One recording's settings, and what two short runs tell about the pipeline's calls."""

    pipe: Any
    network: nn.Module
    timestep: str
    num_samples: int
    num_inference_steps: int
    seed: int
    batch_size: int
    pipe_kwargs: dict[str, Any] = field(default_factory=dict)

    def calls(self, first: int, size: int, steps: int, **changes: Any) -> list[Call]:
        """The calls that draw samples first .. first + size - 1."""
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
        """The calls that draw the batch from sample `first` on, as leaves by flat name."""
        size = min(self.batch_size, self.num_samples - first)
        return [leaves(call) for call in self.calls(first, size, self.num_inference_steps)]

    def size_of(self, call: Call) -> int:
        """Rows of a call: of its first tensor beside the timestep, what it denoises."""
        for name, value in call.items():
            if isinstance(value, Tensor) and name != self.timestep and value.dim():
                return value.shape[0]
        raise TFMQError(
            f"calibration: a call of {type(self.network).__name__} has no tensor but {self.timestep!r}."
        )

    def probe(self) -> tuple[frozenset[str], list[list[bool]]]:
        """Names of tensors that have no rows, such as position ids; and, by call and part of its batch, whether the
        condition is there: [[False, True]] where every call has the unconditional rows first, [[True], [False]] where
        calls alternate.

        Two steps for another number of samples than the recording's batches have: what does not grow with them has no
        rows. Two more without guidance: rows that are not among these are unconditional.
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
                "calibration: cannot tell conditional from unconditional rows; all are taken for conditional"
            )
            return [[True]]
        return found

    def key(self, **more: Any) -> str:
        """Of everything that the rows depend on: weights, scheduler, arguments, seeds, versions."""
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


class Sink:
    """Rows as they come: in memory up to `limit` bytes, past that appended to a file per tensor in `folder`."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.kept: list[dict[str, Tensor]] = []
        self.shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.bytes, self.rows, self.on_disk = 0, 0, False

    def append(self, rows: dict[str, Tensor]) -> None:
        if self.shapes and rows.keys() != self.shapes.keys():
            wrong = sorted(rows.keys() ^ self.shapes.keys())[0]
            raise TFMQError(f"calibration: some calls of the network have {wrong!r} and some have not.")
        for name, x in rows.items():
            found, expected = (x.dtype, tuple(x.shape[1:])), self.shapes.get(name)
            if expected is not None and found != expected:
                raise TFMQError(
                    f"calibration: {name!r} has rows of {found[0]} {found[1]} after rows of {expected[0]} {expected[1]}; record "
                    "pictures of different sizes, or prompts of different lengths, separately."
                )
            self.shapes.setdefault(name, found)
        self.rows += len(next(iter(rows.values())))
        self.bytes += sum(x.nbytes for x in rows.values())
        self.kept.append(rows)
        if self.on_disk or self.bytes > self.limit:
            self.flush()

    def flush(self) -> None:
        """Move what is in memory to the files."""
        self.on_disk = True
        try:
            for i, name in enumerate(self.shapes):
                with (self.folder / f"{i}.bin").open("ab") as file:
                    for rows in self.kept:
                        file.write(raw_bytes(rows[name]))
        except OSError as error:
            raise TFMQError(
                f"calibration: the rows cannot be written to {self.folder} ({error.strerror or error}); record fewer samples, or "
                "use another folder."
            ) from error
        self.kept.clear()

    def finish(self) -> dict[str, Tensor]:
        if not self.on_disk:
            return {n: torch.cat([rows[n] for rows in self.kept]) for n in self.shapes}
        return {
            name: _mapped(self.folder / f"{i}.bin", dtype, (self.rows, *shape))
            for i, (name, (dtype, shape)) in enumerate(self.shapes.items())
        }


def _mapped(file: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = torch.Size(shape).numel()
    if file.stat().st_size != count * dtype.itemsize:
        raise TFMQError(
            f"{file}: has {file.stat().st_size} bytes, {count * dtype.itemsize} are expected; remove its folder."
        )
    return torch.from_file(str(file), size=count, dtype=dtype).reshape(*shape)


def record(session: Session, *, deterministic: bool, cache: Path | None, max_memory: float) -> Recording:
    """Run the session, or read what an equal one has left in `cache`."""
    if cache is None:
        # On Linux what is mapped stays readable when its name is gone.
        with tempfile.TemporaryDirectory(prefix="tfmq-rows-") as temporary:
            return _record(session, Path(temporary), deterministic=deterministic, limit=max_memory)
    folder = cache / session.key(deterministic=deterministic)
    ranks = Ranks()
    if not all(ranks.gather((folder / INDEX).is_file())):
        if ranks.rank == 0:
            replace_folder(folder, lambda part: _write(session, part, deterministic=deterministic))
        else:
            _record(session, folder, deterministic=deterministic, limit=float("inf"))
        ranks.gather(None)  # the others wait for the folder
    return _read(folder)


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
        # Ranks have the batches in turn; the first ones may have one more.
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
                    "the rows."
                )
            rows[name] = value
        elif name not in constants:
            constants[name] = value
        elif not _same(constants[name], value):
            raise TFMQError(
                f"calibration: {name!r} has no rows and changes between calls ({constants[name]!r}, {value!r})."
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
            f"calibration: a call has an argument that no cache can keep ({error}); record without cache=."
        ) from error
    (folder / INDEX).write_text(text)


def _read(folder: Path) -> Recording:
    try:
        index = json.loads((folder / INDEX).read_text())
        rows = {
            name: _mapped(folder / f"{i}.bin", getattr(torch, dtype), shape)
            for i, (name, dtype, shape) in enumerate(index["rows"])
        }
        shared = {
            n: torch.tensor(x, dtype=getattr(torch, dtype)) for n, (dtype, x) in index["shared"].items()
        }
        return Recording(
            rows=rows,
            constants={**index["constants"], **shared},
            paths={n: tuple(path) for n, path in index["paths"].items()},
            conditional=torch.tensor(index["conditional"], dtype=torch.bool),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TFMQError(
            f"{folder}: not a recording that can be read ({error}); remove it to record again."
        ) from error


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
