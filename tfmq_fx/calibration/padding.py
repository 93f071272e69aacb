"""Find which tensors of a network are padded to one length, by masks, and leave the padding out of calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.base.arithmetic import dtype_name
from tfmq_fx.base.masked_rows import MaskedRows, lengths_of
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.row_sizes import RowSizes

LEAK = 1e-3  # relative to the effect of a token that is there: that of one that is not, which is rounding at most


@torch.no_grad()
def without_padding(
    network: nn.Module, data: CalibrationSet, *, zeros: bool = False
) -> CalibrationSet | None:
    """Return the set with rows of their own lengths, for a network that computes the same without padding; None for another one.

    A mask (N, M) has ones for the first tokens of a row, then zeros. It marks a tensor (N, M, ...) if the network's output
    depends on the tensor's last tokens with a mask of ones, and does not once zeros are in their place.

    zeros: leave out tensors (N, M, ...) that are 0 everywhere, too, such as those of a picture that is not given.
    """
    if data.row_lists is not None:
        return None
    names = [
        n
        for n in data.tensors
        if n != data.timestep and data.paths[n] == (n,) and n not in {*data.repeats, *data.folded}
    ]
    lengths = {n: found for n in names if (found := lengths_of(data.tensors[n])) is not None}
    if not lengths:
        return None
    try:
        marks = _Probe(data.row_wise(network), data, tuple(lengths)).marks(
            [n for n in names if data.tensors[n].dim() > 2 and data.tensors[n].is_floating_point()]
        )
    except Exception:  # the network's own, of any type
        return None
    marked_names = [n for marked in marks.values() for n in marked]
    if not marked_names or len(set(marked_names)) < len(marked_names):
        return None
    masks = {n: (dtype_name(data.tensors[n].dtype), marked) for n, marked in marks.items()}
    shared = tuple(n for n, x in data.constants.items() if isinstance(x, Tensor))
    fixed = [n for n in names if n not in masks and data.tensors[n].dim() > 2 and not data.tensors[n].any()]
    if zeros and not (fixed := [n for n in fixed if n not in marked_names]):
        return None
    blank = {n: (dtype_name(data.tensors[n].dtype), tuple(data.tensors[n].shape[1:])) for n in fixed}
    lists = MaskedRows(tuple(marked_names), (), shared, masks=masks, zeros=blank if zeros else {})
    return _cut(data, lists, {n: lengths[mask] for mask, marked in marks.items() for n in marked})


def cut_by_masks(data: CalibrationSet, lists: MaskedRows) -> CalibrationSet:
    """Return the set without the padding that these masks mark; without a mask, all tokens of its tensors are there.

    Raises TFMQError as `MaskedRows.lengths` does, and for values of a tensor that was 0 everywhere at capture.
    """
    lists.require_zeros(data.tensors, where="calibration")
    return _cut(data, lists, lists.lengths(data.tensors, where="calibration"))


def _cut(data: CalibrationSet, lists: MaskedRows, lengths: Mapping[str, Tensor]) -> CalibrationSet:
    """Return a set without masks, whose padded tensors have rows of these lengths (N,)."""
    sizes = {
        n: torch.cat([length[:, None], torch.tensor([data.tensors[n].shape[2:]] * len(length)).view(len(length), -1)], 1)
        for n, length in lengths.items()
    }  # fmt: skip
    known = data.row_sizes or RowSizes({})
    return data.changed(
        tensors={n: x for n, x in data.tensors.items() if n not in lists.left_out},
        paths={n: path for n, path in data.paths.items() if n not in lists.left_out},
        row_lists=lists,
        row_sizes=RowSizes(
            {n: x for n, x in known.of.items() if n not in lists.left_out} | sizes, known.shared, known.values
        ),
    )


@dataclass(frozen=True)
class _Probe:
    """Runs a network on two rows of one timestep.

    masks: the names of what may be masks.
    """

    network: nn.Module
    data: CalibrationSet
    masks: tuple[str, ...]

    def marks(self, tensors: list[str]) -> dict[str, tuple[str, ...]]:
        """Return which tensors each mask marks, without masks that mark none."""
        rows = self.data.groups(2, one_timestep=True)[0]
        given = self.data.arguments(rows if len(rows) > 1 else rows.repeat(2), beside=self.network)
        given |= {n: torch.ones_like(given[n]) for n in self.masks}
        found = {}
        for mask in self.masks:
            fit = [n for n in tensors if given[n].shape[1] == given[mask].shape[1]]
            found[mask] = tuple(n for n in fit if self._marked(given, n, mask))
        return {n: marked for n, marked in found.items() if marked}

    def _marked(self, given: Mapping[str, Any], tensor: str, mask: str) -> bool:
        length = given[mask].shape[1] // 2
        ones = given[mask].clone()
        ones[:, length:] = 0
        padded = {**given, mask: ones}
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(given[tensor].shape, generator=generator).to(given[tensor])
        noise[:, :length] = given[tensor][:, :length]
        leak = _distance(self._run({**padded, tensor: noise}), self._run(padded))
        effect = _distance(self._run({**given, tensor: noise}), self._run(given))
        return effect > 0 and leak <= LEAK * effect

    def _run(self, given: Mapping[str, Any]) -> list[Tensor]:
        copied = pytree.tree_map(lambda x: x, dict(given))
        return [x for x in pytree.tree_leaves(self.network(**copied)) if isinstance(x, Tensor)]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.float() - y.float()).norm()) for x, y in zip(a, b, strict=True))
