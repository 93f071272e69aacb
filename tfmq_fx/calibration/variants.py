"""Constants that differ between a pipeline's calls: each row is computed as its call was.

Skip-layer guidance (Stability AI's SD3.5) calls its network once more in some steps, with the layers to skip as an argument. Such an
argument is constant in a graph. For calibration, each row says by itself which of the calls' constants are its own:

    network(x), network(x, skip_layers=[7])   ==>   network(x, variant_rows=[0, 1])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.interface import VARIANT
from tfmq_fx.base.arguments import Path, leaves, nested
from tfmq_fx.base.signatures import call_of, named_arguments, signature_of, with_flag, with_forward


@dataclass(frozen=True)
class Variants:
    """The constants of some calls that are others than in the first call, by flat name; None where a call lacks one.

    others: of each further kind of call. Rows of kind i > 0 have others[i - 1], rows of kind 0 none of them.
    paths: where the names belong among the arguments.
    """

    others: Sequence[Mapping[str, Any]]
    paths: Mapping[str, Path]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of what differs."""
        return tuple(dict.fromkeys(n for other in self.others for n in other))

    def row_wise(self, network: nn.Module) -> nn.Module:
        """Return the same network, on the same tensors, whose argument `variant_rows` (N,) int64 tells each row's kind.

        It computes the whole call once for each kind, and takes each row from its own.
        """
        signature = signature_of(network)

        def forward(inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            kinds = kwargs.pop(VARIANT)
            given = named_arguments(signature, args, kwargs)
            made = _called(inner, network, given)
            for i, other in enumerate(self.others, 1):
                found = _called(inner, network, self._changed(given, other))
                made = pytree.tree_map(_Chosen(kinds == i), found, made)
            return made

        return with_forward(network, forward, with_flag(signature, VARIANT))

    def _changed(self, given: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments with another kind's constants. An argument of which nothing is left is left out."""
        changed = dict(given)
        for top in dict.fromkeys(str(self.paths[n][0]) for n in other):
            kept = dict(leaves({top: given.get(top)}).values())
            kept |= {self.paths[n]: value for n, value in other.items() if self.paths[n][0] == top}
            inner = {path: value for path, value in kept.items() if value is not None or len(path) == 1}
            changed.pop(top, None)
            changed |= nested(inner)
        return changed


def _called(inner: Callable[..., Any], network: nn.Module, given: Mapping[str, Any]) -> Any:
    args, kwargs = call_of(network, given)
    return inner(*args, **kwargs)


@dataclass(frozen=True)
class _Chosen:
    """A choice between two outputs, by row."""

    rows: Tensor  # (N,) bool: those of the first

    def __call__(self, a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor):
            return b
        rows = self.rows
        for _ in a.shape[1:]:
            rows = rows.unsqueeze(-1)
        return torch.where(rows, a, b)
