"""What a network shows of its arguments when it is called with some of them changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.base.arguments import nested
from tfmq_fx.base.arithmetic import dtype_name
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.rounding import within_rounding
from tfmq_fx.base.row_lists import RowLists
from tfmq_fx.base.stand_ins import StandIn
from tfmq_fx.calibration.calls import Flat, Leaves, computing, flat, same
from tfmq_fx.calibration.shapes import Shapes


def sample_in(call: Flat, timestep: str) -> str:
    """Return the name of the noisy sample: a call's first tensor other than the timestep. Raises TFMQError if there is none."""
    for name, value in call.items():
        if isinstance(value, Tensor) and name != timestep and value.dim():
            return name
    raise TFMQError(f"calibration: a call of the network has no tensor but {timestep!r}.")


def rows_in(call: Flat, timestep: str) -> int:
    """Return the number of rows of a call: that of its noisy sample."""
    rows: int = call[sample_in(call, timestep)].shape[0]
    return rows


def tensor_of(call: Leaves, name: str) -> Tensor | None:
    """Return a tensor of a call; None if the call leaves it out."""
    value = call.get(name, ((), None))[1]
    return value if isinstance(value, Tensor) else None


def completed(call: Leaves, stand_ins: Mapping[str, StandIn], timestep: str) -> Leaves:
    """Return the leaves of a call with what stands for the tensors that it leaves out."""
    found = dict(call)
    for name, stand_in in stand_ins.items():
        like = tensor_of(call, stand_in.like)
        if tensor_of(call, name) is None and like is not None:
            rows = rows_in(flat(call), timestep)
            found[name] = (name,), stand_in.of(like, rows)
            found[stand_in.like] = call[stand_in.like][0], like.expand(rows, *like.shape[1:])
    return found


@dataclass(frozen=True)
class Trials:
    """Calls of a network, to see what its arguments are.

    timestep: the name of its argument. lists: what it takes as lists of rows. moving: the names of tensors without rows that are not
    the same in all calls.
    """

    network: nn.Module
    timestep: str
    lists: RowLists | None
    moving: frozenset[str]

    def stand_in(self, name: str, given: Leaves, without: Leaves) -> StandIn | None:
        """Return what a tensor is in a call without it; None if nothing in its place leaves the network's output as it is."""
        path, tensor = given[name]
        likes = [
            n
            for n, (_, x) in given.items()
            if isinstance(x, Tensor) and x.dim() > 2 and x.shape[:2] == tensor.shape
        ]
        likes = [n for n in likes if tensor_of(without, n) is not None]
        if path != (name,) or not likes:
            return None
        dtype = dtype_name(tensor.dtype)
        expected = self.computed(nested(dict(without.values())))
        for found in (StandIn(value, like, dtype) for like in likes for value in (1, 0)):
            call = completed(without, {name: found}, self.timestep)
            made = self.computed(nested(dict(call.values())))
            if expected is not None and made is not None and within_rounding(made, expected):
                return found
        return None

    def is_of_the_call(self, name: str, call: Leaves) -> bool:
        """Return True if the network takes a tensor as it is for other numbers of rows of a call: it has none itself."""
        one = flat(call)
        shapes = Shapes.of(one, rows_in(one, self.timestep), apart={*self.moving, self.timestep, name})
        shapes.shared[name] = one[name].shape
        single = self.of_all_rows([call], shapes)
        alone, both = (self.repeated(call, shapes, count, single=single) for count in (1, 2))
        return alone is not None and both is not None and all(within_rounding(x[None], alone) for x in both)

    def apart(self, call: Leaves, shapes: Shapes, folded: Mapping[str, int]) -> bool:
        """Return True if the first k entries of each folded tensor are the first row's, and no other row's.

        The network shows it: a row is the same by itself, beside another one with other entries, and in its call.
        """
        alone = self.repeated(call, shapes, 1, folded=folded)
        both = self.repeated(call, shapes, 2, folded=folded, change=lambda x: 1 - x.flip(-1) / 2)
        whole = self.computed(nested(dict(call.values())))
        if alone is None or both is None or whole is None:
            return False
        effect = (both[1:] - alone).norm()
        return bool(effect > 0 and all((x[:1] - alone).norm() <= 0.1 * effect for x in (both, whole)))

    def of_all_rows(self, seen: Sequence[Leaves], shapes: Shapes) -> set[str]:
        """Return which tensors (1, ...) of calls of one row are the same for all rows: the network takes no second one of them."""
        first, calls = seen[0], [flat(call) for call in seen]
        if any(rows_in(call, self.timestep) != 1 for call in calls):
            return set()
        _, *names = [n for n in shapes.likely if first[n][1].shape[:1] == (1,)]
        fixed = [n for n in names if all(same(call.get(n), calls[0][n]) for call in calls)]
        if not fixed or self.repeated(first, shapes, 2) is not None:
            return set()
        arguments = dict.fromkeys(first[n][0][0] for n in fixed)
        alone = [[n] for n in fixed]
        lists = [[n for n in fixed if first[n][0][0] == argument] for argument in arguments]
        for groups in (alone, lists):  # of a list's tensors, positions by dimension, all or none
            found = [g for g in groups if self.repeated(first, shapes, 2, single=g) is not None]
            if found:
                return {n for group in found for n in group}
        return set()

    def repeated(
        self,
        call: Leaves,
        shapes: Shapes,
        count: int,
        *,
        folded: Collection[str] = (),
        change: Callable[[Tensor], Tensor] = lambda x: x,
        single: Collection[str] = (),
    ) -> Tensor | None:
        """Return what the network computes of the first row of a call, `count` times; None if it fails.

        folded: the names of tensors with several entries for each row, which `change` makes others for the second row.
        single: the names of those that are there once.
        """
        rows = rows_in(flat(call), self.timestep)

        def taken(name: str, x: Any) -> Any:
            if name in folded:
                return torch.cat([x[: len(x) // rows], change(x[: len(x) // rows])][:count])
            if name in shapes.repeats:
                return torch.cat([x[: len(x) // rows]] * count)
            has_rows = (
                isinstance(x, Tensor)
                and x.shape[:1] == (rows,)
                and name not in {*shapes.shared, *self.moving}
            )
            return torch.cat([x[:1]] * count) if has_rows and name not in single else x

        return self.computed(nested({path: taken(n, x) for n, (path, x) in call.items()}))

    @torch.no_grad()
    def computed(self, given: dict[str, Any]) -> Tensor | None:
        """Return the network's first output; None if it fails."""
        lists = self.lists
        with computing(self.network):
            network = self.network if lists is None else lists.batched(self.network)
            try:
                return next(x for x in pytree.tree_leaves(network(**given)) if isinstance(x, Tensor))
            except Exception:  # the network's own, of any type
                return None
