"""Networks that take rows padded to one length, with masks that say how many of each row's tokens are there.

    network(x, t, words (N, M, D), mask (N, M))   ==>   for the rows of each length L: network(x, t, words (n, L, D))

A network that reads these lengths as numbers, row by row, has no graph for all of them at once. But it computes the same
of rows without their padding, whose masks hold nothing but ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.row_lists import RowLists, TensorRows, known_as
from tfmq_fx.base.second_rows import SecondRows
from tfmq_fx.base.signatures import signature_of, with_forward


@dataclass(frozen=True)
class MaskedRows(TensorRows):
    """What of a network's arguments are rows of different lengths, which masks tell.

    arguments: the names of the padded tensors, (N, M, ...). In their place, a call may have lists of rows (L, ...).
    masks: mask's name -> its dtype, and the tensors whose tokens it marks. The first L of a row are there.
    zeros: the name of a tensor that is 0 everywhere in every call, and may be left out -> its dtype, and the shape of a row.
    """

    masks: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    zeros: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Return the names of the arguments that are no inputs of the graph."""
        return (*self.masks, *self.zeros)

    def listed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments with a mask of ones for each that it lacks, and zeros where those are left out."""
        found, first = dict(given), given[self.arguments[0]]
        for name, (dtype, shape) in self.zeros.items():
            if found.get(name) is None:
                kind = getattr(torch, dtype)
                found[name] = torch.zeros((first.shape[0], *shape), dtype=kind, device=first.device)
        for name, (dtype, marked) in self.masks.items():
            if found.get(name) is None:
                x = found[marked[0]]
                found[name] = torch.ones(x.shape[:2], dtype=getattr(torch, dtype), device=x.device)
        return found

    def in_lists(self, given: Mapping[str, Any]) -> bool:
        """Return True if a call has masks, or lists of rows."""
        return super().in_lists(given) or any(given.get(n) is not None for n in self.left_out)

    def by_shape(self, network: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Return what a network without masks makes of padded rows: rows of equal lengths together, the others by themselves."""
        without = self.cut(given)
        made = [network(**part) for part in self.parts(without)]
        order = torch.tensor([i for rows in self.groups(without) for i in rows]).argsort()

        def joined(*parts: Any) -> Any:
            return torch.cat(parts)[order.to(parts[0].device)] if isinstance(parts[0], Tensor) else parts[0]

        return made[0] if len(made) == 1 else pytree.tree_map(joined, *made)

    def cut(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments without masks and zeros, with lists of rows without padding. Raises TFMQError for other ones."""
        self.require_zeros(given)
        found = {n: x for n, x in given.items() if n not in self.left_out}
        for name, lengths in self.lengths(given).items():
            found[name] = [row[:length] for row, length in zip(given[name], lengths.tolist(), strict=True)]
        return found

    def require_zeros(self, given: Mapping[str, Any], *, where: str = "forward") -> None:
        """Raise TFMQError, beginning with `where`, for other values of a tensor that was 0 everywhere at capture."""
        for name in self.zeros:
            x = given.get(name)
            if x is not None and not (isinstance(x, Tensor) and bool((x == 0).all())):
                raise TFMQError(
                    f"{where}: {name!r} was 0 everywhere when the network was captured and is fixed in the graph; capture it again "
                    "with the new values."
                )

    def lengths(self, given: Mapping[str, Any], *, where: str = "forward") -> dict[str, Tensor]:
        """Return the lengths (N,) of each padded tensor's rows, which are whole where its mask is left out.

        where: what the words of an error begin with. Raises TFMQError naming a mask of another shape, or with other values.
        """
        padded = {(name, n): given[n] for name, (_, marked) in self.masks.items() for n in marked}
        return {
            n: torch.full((len(x),), x.shape[1])
            if given.get(name) is None
            else _lengths(name, given[name], x, where)
            for (name, n), x in padded.items()
            if isinstance(x, Tensor)
        }

    def batched(self, network: nn.Module) -> nn.Module:
        """Return the same network, whose masks may be left out: then all tokens are there. Padded tensors may be lists of rows."""
        signature = signature_of(network)

        def forward(own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(*args, **kwargs)
            if RowLists.in_lists(self, given.arguments):
                return self.by_shape(view, given.arguments)
            given.arguments.update(self.listed(given.arguments))
            return own(*given.args, **given.kwargs)

        view = known_as(with_forward(network, forward, signature), self)
        return view

    def alone(self, name: str) -> bool:  # noqa: ARG002
        """Return False: a single row of an argument is a batch of one."""
        return False

    def to_json(self) -> dict[str, Any]:
        """Return what an artefact keeps."""
        masks = {n: [dtype, list(marked)] for n, (dtype, marked) in self.masks.items()}
        zeros = {n: [dtype, list(shape)] for n, (dtype, shape) in self.zeros.items()}
        return {**super().to_json(), "masks": masks, "zeros": zeros}


def _lengths(name: str, mask: Any, x: Tensor, where: str) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise TFMQError(f"{where}: {name!r} is {found}, but must be a mask of shape {tuple(x.shape[:2])}.")
    lengths = lengths_of(mask)
    if lengths is None:
        raise TFMQError(
            f"{where}: {name!r} must have ones for the first tokens of a row, and then zeros: the network was captured for rows "
            "without padding, which is cut off."
        )
    return lengths


def lengths_of(mask: Tensor) -> Tensor | None:
    """Return the number of ones that each row of a mask (N, M) starts with, (N,); None if anything else is in it."""
    if mask.dim() != 2 or mask.dtype.is_complex:
        return None
    ones, zeros = mask == 1, mask == 0
    plain = bool((ones | zeros).all()) and not bool((ones[:, 1:] & zeros[:, :-1]).any())
    return ones.sum(1) if plain else None


def lists_of_json(found: Mapping[str, Any]) -> RowLists:
    """Return what `to_json` of any kind gave."""
    own, masks = RowLists.of_json(found), found.get("masks")
    if found.get("second"):
        return SecondRows(own.arguments, own.outputs)
    if masks is None:
        return own
    kept = {n: (dtype, tuple(marked)) for n, (dtype, marked) in masks.items()}
    zeros = {n: (dtype, tuple(shape)) for n, (dtype, shape) in found.get("zeros", {}).items()}
    return MaskedRows(own.arguments, own.outputs, own.shared, masks=kept, zeros=zeros)
