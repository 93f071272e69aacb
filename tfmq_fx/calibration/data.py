"""Calibration data: inputs that the network received while sampling."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from tfmq_fx.base.ambient import tracked
from tfmq_fx.base.arguments import Path as ArgumentPath
from tfmq_fx.base.arguments import leaves, nested
from tfmq_fx.base.entries import per_sample
from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.base.offloaded import executing_on, usable_device
from tfmq_fx.base.row_lists import RowLists, is_list_of_rows, row_lists
from tfmq_fx.base.second_rows import SecondRows, is_second
from tfmq_fx.base.stand_ins import StandIn
from tfmq_fx.calibration.perturbed import Perturbation
from tfmq_fx.calibration.pipelines import OWN_PROMPTS, denoiser, prompts_for, require_pipeline, takes_steps
from tfmq_fx.calibration.ready import require_ready
from tfmq_fx.calibration.recording import MAX_MEMORY, record
from tfmq_fx.calibration.row_sizes import RowSizes, padded
from tfmq_fx.calibration.session import MOST_SEED, Session
from tfmq_fx.calibration.temporal_rows import is_scalar
from tfmq_fx.calibration.timesteps import timestep_of
from tfmq_fx.calibration.variants import Variants
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import fixed_size, meta_value, on_device_of
from tfmq_fx.graph.state import captured_of


class CalibrationSet:
    """A set of inputs that the network received while sampling: named tensors of N rows each, with the timestep of each row.

    Invariants: at least one row; all tensors have the same first dimension; every value is finite. A tensor
    inside a dict or list argument has a flat name ("added_cond_kwargs_time_ids") and its path in `paths`.
    `constants` has what is the same in every call: plain values, and tensors without rows (position ids).
    `timestep_shape` is that of a row's timestep as the network takes it: (), (1,), or (tokens,) if a row has one for each token or
    frame. In `tensors` one alone has shape ().
    `repeats` has the tensors of which the network takes each row several times in a row (a prompt for every frame).
    `folded` has the tensors (N, k, ...) that the network takes as (N * k, ...): what it has for each frame of a row.
    `perturbation` is what the pipeline sets in its network while it samples, for rows where `perturbed_rows` is true.
    `others` has, for rows where `variant_rows` is i > 0, the constants others[i - 1] that differ from `constants` (`calibration.variants`).
    `row_lists` is what the network takes as lists with an entry for each row; None if there are none.
    `row_sizes` has the sizes of rows that differ, whose tensors are padded, and tensors without rows that differ; None if there are none.
    `stand_ins` has what stands for tensors that some calls leave out, such as a mask of ones. `idle` has the names of objects that are left
    out, as the network does nothing with them.
    `conditional` (N,) bool is False for the unconditional rows, which guidance adds. `note`: what was chosen for
    the user when the set was recorded, as the report says it.

    Raises TFMQError for what breaks them, naming the tensor and the row.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        constants: Mapping[str, Any],
        timestep: str,
        paths: Mapping[str, ArgumentPath] | None = None,
        *,
        conditional: Tensor | None = None,
        note: str = "",
        timestep_shape: Sequence[int] = (),
        repeats: Mapping[str, int] | None = None,
        folded: Collection[str] = (),
        perturbation: Perturbation | None = None,
        others: Sequence[Mapping[str, Any]] = (),
        row_lists: RowLists | None = None,
        row_sizes: RowSizes | None = None,
        stand_ins: Mapping[str, StandIn] | None = None,
        idle: Collection[str] = (),
    ) -> None:
        # Rows recorded under inference_mode could not be learned from.
        self.tensors = {n: tracked(x) for n, x in tensors.items()}
        self.constants = {n: tracked(x) if isinstance(x, Tensor) else x for n, x in constants.items()}
        self.timestep, self.note, self.repeats = timestep, note, dict(repeats or {})
        self.folded = frozenset(folded)
        self.perturbation, self.others = perturbation, tuple(others)
        self.row_lists, self.row_sizes, self.stand_ins = row_lists, row_sizes, dict(stand_ins or {})
        self.idle = tuple(idle)
        self.paths: dict[str, ArgumentPath] = {n: (n,) for n in (*tensors, *constants)} | dict(paths or {})
        if timestep not in self.tensors:
            raise TFMQError(
                f"calibration: no tensor named {timestep!r}; found {nearest_names(timestep, self.tensors)}. "
                "Name the timestep with timestep=..."
            )
        if scalars := [name for name, x in self.tensors.items() if not x.dim()]:
            raise TFMQError(f"calibration: {scalars[0]!r} is a single number; give one for each row, (N,).")
        sizes = {name: x.shape[0] for name, x in self.tensors.items()}
        if not all(sizes.values()):
            raise TFMQError(f"calibration: the set is empty (rows by tensor: {sizes}).")
        if len(set(sizes.values())) != 1:
            raise TFMQError(f"calibration: tensors have different numbers of rows: {sizes}.")
        for name, x in self.tensors.items():
            for start in (
                range(0, len(x), 1024) if x.is_floating_point() else ()
            ):  # they may be larger than memory
                finite = torch.isfinite(
                    x[start : start + 1024].flatten(1) if x.dim() > 1 else x[start : start + 1024, None]
                )
                if not finite.all():
                    row = start + int((~finite.all(1)).nonzero()[0])
                    raise TFMQError(
                        f"calibration: tensor {name!r} holds NaN or infinite values, first in row {row}."
                    )
        t = self.tensors[timestep]
        if t.numel() == len(t):
            self.timestep_shape = (*t.shape[1:], *timestep_shape)
            self.tensors[timestep] = t.reshape(-1)
        else:
            self.timestep_shape = tuple(t.shape[1:])
        self.conditional = torch.ones(len(self), dtype=torch.bool) if conditional is None else conditional
        marks = self.conditional
        if not isinstance(marks, Tensor) or marks.dtype != torch.bool or marks.shape != (len(self),):
            found = (
                f"{marks.dtype} {tuple(marks.shape)}" if isinstance(marks, Tensor) else type(marks).__name__
            )
            raise TFMQError(
                f"calibration: conditional is {found}, but must be one torch.bool for each of the {len(self)} rows, ({len(self)},)."
            )

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in self.tensors.items())
        return f"CalibrationSet({len(self)} rows at {len(self.timesteps)} timesteps: {shapes})"

    def __len__(self) -> int:
        return len(self.tensors[self.timestep])

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, Any], *, timestep: str = "timestep", row_lists: Collection[str] | None = None
    ) -> CalibrationSet:
        """Build a set from the network's arguments by name.

        tensors: (N, ...) each, or dicts and lists of such tensors. For a network that takes lists with an entry for each row,
            lists of N tensors without a batch, whose sizes may differ. For one that takes rows in the second dimension,
            (K, N, ...), with K other than N.
        row_lists: the names of such lists; None takes those of N tensors of which not all have N rows themselves.
        timestep: the name of the timesteps' tensor: (N,) or (N, 1), one per row, or (N, tokens), one for each token or frame of it.
        """
        rows = tensors.get(timestep)
        count = len(rows) if isinstance(rows, Tensor) and rows.dim() else 0
        lists = {
            n: x
            for n, x in tensors.items()
            if (is_list_of_rows(x, count) if row_lists is None else n in row_lists)
        }
        sizes = {n: torch.tensor([[*e.shape] for e in x]) for n, x in lists.items()}
        differ = {n: x for n, x in sizes.items() if bool((x != x[:1]).any())}
        noisy = next((n for n in tensors if n != timestep), None)
        if noisy in differ:
            raise TFMQError(
                f"calibration: {noisy!r} has samples of {len(sizes[noisy].unique(dim=0))} sizes; calibrate on those of one size."
            )
        second = SecondRows(tuple(n for n, x in tensors.items() if is_second(x, count)), ())
        tensors = second.taken(tensors)
        found = leaves({**tensors, **{n: padded([e[None] for e in x]) for n, x in lists.items()}})
        wrong = [n for n, (_, x) in found.items() if not isinstance(x, Tensor)]
        if wrong:
            raise TFMQError(
                f"calibration: {wrong[0]!r} is a {type(found[wrong[0]][1]).__name__}, not a tensor."
            )
        paths = {n: path for n, (path, _) in found.items()}
        made = CalibrationSet(
            {n: x for n, (_, x) in found.items()}, {}, timestep, paths,
            row_lists=RowLists(tuple(lists), ()) if lists else second if second.arguments else None,
            row_sizes=RowSizes(differ) if differ else None,
        )  # fmt: skip
        _require_schedule(made)
        return made

    def row_wise(self, network: nn.Module) -> nn.Module:
        """Return the float network as it takes these rows, each by itself: another one on its tensors, or the network."""
        found = network if self.perturbation is None else self.perturbation.row_wise(network)
        if self.others:
            found = Variants(self.others, self.paths).row_wise(found)
        if self.row_lists is None:
            return found
        if not self.row_lists.known:  # the set was made without the network
            self.row_lists = self._lists_of(found)
        return self.row_lists.batched(found)

    @property
    def kinds(self) -> str:
        """Return in words what differs between the calls of the network; "" if nothing does."""
        found = []
        if names := ", ".join(Variants(self.others, self.paths).names):
            found.append(
                f"{names}: not the same in all calls of the network; each row is computed as its call was"
            )
        found += [
            f"{name}: left out by some calls of the network, as if it were {x.value} everywhere"
            for name, x in self.stand_ins.items()
        ]
        found += [
            f"{name}: an object without tensors, with which the network does nothing; left out"
            for name in self.idle
        ]
        return "; ".join(found)

    def _lists_of(self, network: nn.Module) -> RowLists:
        """Return which lists of rows a network takes, and returns. Raises TFMQError if it takes none of the set's."""
        assert self.row_lists is not None
        one = self.row_lists.listed(self.arguments(slice(0, 1), beside=network))
        found = row_lists(network, one, self.timestep)
        if found is None or set(found.arguments) != set(self.row_lists.arguments):
            raise TFMQError(
                f"calibration: {' and '.join(self.row_lists.arguments)} are lists with an entry for each row, but "
                f"{type(network).__name__} does not compute a row for each entry; give tensors (N, ...)."
            )
        return found

    def arguments(
        self, rows: slice | Tensor, *, beside: nn.Module | None = None, rows_first: bool = False
    ) -> dict[str, Any]:
        """Return the keyword arguments of the network for these rows, nested as it takes them, including constants.

        rows: a slice or indices, of one kind unless the network takes lists: then what has rows of different sizes is a list of them.
        beside: the network on whose device they will be; None leaves them where they are.
        rows_first: what the network takes with rows in the second dimension, (K, N, ...), has them in the first, as `row_wise` takes it.
        """
        values = {n: self._taken(n, rows) for n in (*self.tensors, *self._moving)} | self.constants
        values[self.timestep] = values[self.timestep].reshape(-1, *self.timestep_shape)
        own = None if beside is None else next(iter((*beside.parameters(), *beside.buffers())), None)
        found = nested(
            {
                self.paths[n]: x
                if own is None
                else pytree.tree_map_only(Tensor, lambda x: x.to(own.device), x)
                for n, x in values.items()
            }
        )
        lists = self.row_lists
        return found if rows_first or lists is None or lists.by_row else lists.listed(found)

    def example(self, count: int, *, beside: nn.Module | None = None) -> dict[str, Any]:
        """Return the `arguments` of `row_wise` for `count` rows, of one size: the most frequent one. If there are fewer, they are repeated."""
        rows = torch.arange(min(count, len(self))) if self.row_sizes is None else self.row_sizes.most()
        rows = rows[torch.arange(count) % len(rows)]
        return self.arguments(rows, beside=beside, rows_first=True)

    @staticmethod
    @torch.no_grad()
    def record(
        pipe: Any,
        *,
        num_samples: int,
        num_inference_steps: int | None,
        seed: int = 0,
        batch_size: int = 64,
        timestep: str = "timestep",
        component: str | None = None,
        deterministic: bool = True,
        cache: str | Path | None = None,
        max_memory: float = MAX_MEMORY,
        execution_device: str | torch.device | None = None,
        **pipe_kwargs: Any,
    ) -> CalibrationSet:
        """Run the pipeline once and record every call of its denoiser: one trajectory per sample.

        Samples are drawn in batches, each with its own seed. Rows of a guided pipeline are marked in
        `conditional`. The processes of a torch.distributed group share the batches, and all get every row.

        num_samples, num_inference_steps: the number of trajectories, and of sampling steps in each. None for the steps of a
            pipeline that takes no such argument, but a list of noise levels, or has a number of its own.
        batch_size: how many samples are drawn at once.
        timestep: the denoiser's timestep argument. The denoiser is the component that is called with it. If none takes a
            "timestep", a short run shows the argument that changes from call to call.
        component: the name of the denoiser, if several components take a `timestep`.
        deterministic: run torch on one thread, so that the rows are bitwise the same on any number of threads;
            False is faster on a CPU with many cores.
        cache: a folder that keeps recordings. A recording with equal weights, scheduler, arguments, seeds and
            versions is read instead of made again.
        max_memory: bytes; larger recordings are memory-mapped files, in `cache` or the system's temporary folder.
        execution_device: where the pipeline computes, if it does not fit there: as `quantize` has it.
        pipe_kwargs: passed to the pipeline (prompt, class_labels, guidance_scale, eta, ...). A list has one value
            per sample, and is repeated if it is shorter, unless short runs show that the pipeline takes it as a
            whole (one value per adapter, ControlNet or layer). A tuple is always passed as it is. Without a prompt, a
            pipeline that needs one gets 64 of this library's own, and the log and the report say so.
        """
        require_pipeline(pipe, pipe_kwargs)
        numbers = {"num_samples": num_samples, "batch_size": batch_size}
        if num_inference_steps is not None:
            numbers["num_inference_steps"] = num_inference_steps
        for name, number in numbers.items():
            if not isinstance(number, Integral) or number < 1:
                raise TFMQError(f"calibration: {name}={number!r} must be a positive integer.")
        if not isinstance(seed, Integral) or abs(seed) > MOST_SEED:
            raise TFMQError(f"calibration: seed={seed!r} must be an integer up to {MOST_SEED}.")
        if num_inference_steps is None and takes_steps(pipe, by_name=True):
            raise TFMQError(
                f"calibration: {type(pipe).__name__} takes 'num_inference_steps'; the number of steps is missing."
            )
        if num_inference_steps is not None and not takes_steps(pipe):
            raise TFMQError(
                f"calibration: {type(pipe).__name__} takes no 'num_inference_steps'; give num_inference_steps=None."
            )
        device = usable_device(execution_device, "execution_device")
        own = prompts_for(pipe, pipe_kwargs)
        pipe_kwargs |= own
        timestep = timestep_of(
            pipe, timestep, component=component, steps=num_inference_steps, pipe_kwargs=pipe_kwargs
        )
        network = denoiser(pipe, timestep=timestep, component=component)
        require_ready(network)
        session = Session(
            pipe, network, timestep, num_samples, num_inference_steps, seed, batch_size, pipe_kwargs
        )
        folder = None if cache is None else Path(cache)
        # A pipeline computes where its first component says that it is.
        components = {id(m): m for m in (network, *pipe.components.values()) if isinstance(m, nn.Module)}
        with executing_on(components.values(), device):
            found = record(session, deterministic=deterministic, cache=folder, max_memory=max_memory)
        made = CalibrationSet(
            found.rows, found.constants, timestep, found.paths, conditional=found.conditional,
            note=OWN_PROMPTS if own else "", repeats=found.repeats, folded=found.folded,
            perturbation=found.perturbation,
            others=found.others,
            row_lists=found.row_lists, row_sizes=found.row_sizes, stand_ins=found.stand_ins,
            idle=found.idle,
        )  # fmt: skip
        _require_schedule(made)
        return made

    @property
    def timesteps(self) -> Tensor:
        """Return the distinct timesteps (T,), of all rows and tokens, largest first, in the order of sampling."""
        values: Tensor = torch.unique(self.tensors[self.timestep])
        return values.flip(0)

    @property
    def row_timesteps(self) -> Tensor:
        """Return one timestep for each row (N,), on the CPU, as all indices of rows are: the largest, if a row has several."""
        return per_sample(self.tensors[self.timestep]).cpu()

    def lacks(self, schedule: Tensor) -> list[float]:
        """Return those timesteps of a schedule (T,) that no row or token has."""
        found = self.timesteps.cpu()
        common = torch.promote_types(schedule.dtype, found.dtype)
        values = schedule.cpu()
        return values[~torch.isin(values.to(common), found.to(common))].tolist()  # type: ignore[no-any-return]

    def spread(self, num_samples: int, *, seed: int = 0) -> CalibrationSet:
        """Return `num_samples` rows, drawn evenly over the timesteps (`row_timesteps`), in shuffled order; all rows if there are fewer."""
        return self.rows(self.draw(num_samples, seed=seed))

    def draw(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """Return the indices (at most num_samples,) of the rows of `spread`, which may not fit in memory themselves."""
        if num_samples < 1:
            raise TFMQError(f"calibration: num_samples={num_samples} must be positive.")
        generator = torch.Generator().manual_seed(seed)
        t = self.row_timesteps
        shuffled = torch.randperm(len(self), generator=generator)
        # The rank of each row among the rows of its timestep. Taking low ranks first spreads over timesteps.
        by_t = shuffled[torch.argsort(t[shuffled], stable=True)]
        rank = _places(t[by_t])
        tie = torch.randperm(len(self), generator=generator)
        chosen = by_t[tie][torch.argsort(rank[tie], stable=True)][:num_samples]
        return chosen[torch.randperm(len(chosen), generator=generator)]

    def trajectories(self) -> Tensor:
        """Return the number of each row's trajectory (N,): of the rows of a timestep, the first is of the first trajectory, and so on.

        That holds for rows in the order in which a sampler makes them, sample by sample or step by step. Where no timestep
        has two rows, each row is a trajectory.
        """
        found = _places(self.row_timesteps)
        return found if found.any() else torch.arange(len(self))

    def rows(self, chosen: Tensor) -> CalibrationSet:
        """Return the set of these rows, given by index or by mask: `data.rows(data.conditional)`."""
        return self.changed(
            tensors={n: x[chosen] for n, x in self.tensors.items()},
            conditional=self.conditional[chosen],
            row_sizes=None if self.row_sizes is None else self.row_sizes.rows(chosen),
            note="",
        )

    def changed(self, **changes: Any) -> CalibrationSet:
        """Return the set with some of what it was made of, by the names of its arguments, replaced."""
        own = {
            "tensors": self.tensors,
            "constants": self.constants,
            "timestep": self.timestep,
            "paths": self.paths,
            "conditional": self.conditional,
            "note": self.note,
            "timestep_shape": self.timestep_shape,
            "repeats": self.repeats,
            "folded": self.folded,
            "perturbation": self.perturbation,
            "others": self.others,
            "row_lists": self.row_lists,
            "row_sizes": self.row_sizes,
            "stand_ins": self.stand_ins,
            "idle": self.idle,
        }
        return CalibrationSet(**{**own, **changes})

    def batches(self, batch_size: int, *, one_timestep: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yield batches of at most `batch_size` rows, each along with the tensors that have no rows.

        one_timestep: give each batch rows of a single timestep, for networks that take one timestep per call.
        """
        for rows in self.groups(batch_size, one_timestep=one_timestep):
            yield self.batch(rows)

    def groups(
        self, batch_size: int, *, rows: Tensor | None = None, one_timestep: bool = False
    ) -> list[Tensor]:
        """Return the row indices of each batch that `batches` yields.

        rows: the indices of the rows to use; None for all.
        """
        rows = torch.arange(len(self)) if rows is None else rows
        t = self.row_timesteps[rows]
        groups = [rows[t == value] for value in t.unique()] if one_timestep else [rows]
        if self.row_sizes is not None:
            groups = [same for group in groups for same in self.row_sizes.groups(group)]
        return [batch for group in groups for batch in group.split(batch_size)]

    @property
    def without_rows(self) -> frozenset[str]:
        """Return the names of what has no rows."""
        return frozenset((*self.constants, *self._moving))

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the rows with these indices, and the tensors that have no rows."""
        shared = [n for n, x in self.constants.items() if isinstance(x, Tensor)]
        return {n: self.input(n, rows) for n in (*self.tensors, *self._moving, *shared)}

    def input(self, name: str, rows: Tensor) -> Any:
        """Return the rows of one input; the whole input if it has no rows."""
        return self.constants[name] if name in self.constants else self._taken(name, rows)

    @property
    def _moving(self) -> Collection[str]:
        """Return the names of tensors without rows that differ."""
        return () if self.row_sizes is None else self.row_sizes.shared

    def _taken(self, name: str, rows: Tensor | slice) -> Any:
        """Return these rows as the network takes them."""
        if self.row_sizes is not None and name in self._moving:
            return self.row_sizes.taken(name, rows)
        x = self.tensors[name][rows]
        if self.row_sizes is not None:
            x = self.row_sizes.cut(name, x, rows)
        if name in self.folded:
            return x.flatten(0, 1)
        return x.repeat_interleave(self.repeats[name], 0) if name in self.repeats else x


def _require_schedule(data: CalibrationSet) -> None:
    """Raise TFMQError for a timestep of several values per row that no sampler gives: it is data, as the times of a series are.

    They are the same in every row, so that no step of a sampler could be told from another, or all of them differ while
    another tensor has one value per row. Not asked of a part of a set, which may have the rows of one step.
    """
    timestep, tensors = data.timestep, data.tensors
    t = tensors[timestep].flatten(1) if tensors[timestep].dim() > 1 else tensors[timestep][:, None]
    if len(t) < 2 or t.shape[1] < 2:
        return
    others = [n for n, x in tensors.items() if n != timestep and x.numel() == len(x)]
    same, apart = bool((t == t[:1]).all()), t.unique().numel() == t.numel()
    if same or (apart and others):
        found = "the same in every row" if same else "all different"
        remedy = f" ({' or '.join(others)} could be it)" if others else ""
        raise TFMQError(
            f"calibration: the timestep {timestep!r} has {t.shape[1]} values per row, {found}: that is data, not a sampler's "
            f"timestep; name that one with timestep=...{remedy}."
        )


def inputs_of(gm: GraphModule, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the batch's tensors in the order of the graph's inputs.

    Raises TFMQError, naming the input, if one is missing or has another shape than the captured one.
    """
    names = list(placeholders(gm))
    missing = [n for n in names if n not in batch]
    if missing:
        raise TFMQError(
            f"calibration: the graph's input {missing[0]!r} is missing; the set has {', '.join(batch)}."
        )
    inputs = [as_taken(gm, n, batch[n]) for n in names]
    for name, node, x in zip(names, placeholders(gm).values(), inputs, strict=True):
        expected = meta_value(node)
        fixed = [fixed_size(d) for d in expected.shape] if isinstance(expected, Tensor) else [None] * x.dim()
        if len(fixed) != x.dim() or any(f not in (None, s) for f, s in zip(fixed, x.shape, strict=True)):
            raise TFMQError(
                f"calibration: {name!r} has shape {tuple(x.shape)}, but the graph was captured with "
                f"({', '.join('N' if f is None else str(f) for f in fixed)}); batches must have that shape."
            )
    return inputs


def as_taken(gm: GraphModule, name: str, x: Tensor) -> Tensor:
    """Return an input as the graph takes it: on its device, and the timestep as a scalar if it was captured with one."""
    x = on_device_of(placeholders(gm)[name], x)
    return x.reshape(-1)[0] if name == captured_of(gm).timestep and is_scalar(gm) else x


def _places(t: Tensor) -> Tensor:
    """Return how many of the entries before each have its value (N,)."""
    _, counts = torch.unique(t, return_counts=True)
    found = torch.empty(len(t), dtype=torch.long)
    found[torch.argsort(t, stable=True)] = torch.cat([torch.arange(int(c)) for c in counts])
    return found
