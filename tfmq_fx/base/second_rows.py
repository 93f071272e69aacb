"""Networks whose rows are the second dimension of some arguments: (K, N, ...), such as K layers of a language model for N prompts.

network(x (N, ...), t (N,), layers (K, N, M, D))     ==>     network(x, t, layers (N, K, M, D))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.row_lists import RowLists, TensorRows, has_rows, known_as, only_other, row_lists, run
from tfmq_fx.base.signatures import signature_of, with_forward


class SecondRows(TensorRows):
    """Which of a network's arguments, (K, N, ...), have rows in their second dimension."""

    by_row = False  # the network computes all rows at once

    @property
    def ragged(self) -> tuple[str, ...]:
        """Return (): rows have one size."""
        return ()

    def stacked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a `batched` network as they are."""
        return dict(given)

    def taken(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments as the `batched` network takes them, with rows first."""
        return {n: _swapped(n, x) if n in self.arguments and x is not None else x for n, x in given.items()}

    def listed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call of the network, from those with rows first."""
        return self.taken(given)

    def in_lists(self, given: Mapping[str, Any]) -> bool:
        """Return True if a call has one of the arguments."""
        return any(given.get(n) is not None for n in self.arguments)

    def by_shape(self, network: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """Return what a network that takes rows first makes of a call."""
        return network(**self.taken(given))

    def parts(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return a call's arguments with rows first, as the only part."""
        return [self.taken(given)]

    def groups(self, given: Mapping[str, Any]) -> list[list[int]]:
        """Return the numbers of the rows, as the only group."""
        return [list(range(next(given[n].shape[1] for n in self.arguments if given.get(n) is not None)))]

    def batched(self, network: nn.Module) -> nn.Module:
        """Return the same network, which takes rows first."""
        signature = signature_of(network)

        def forward(own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(*args, **kwargs)
            given.arguments.update(self.listed(given.arguments))
            return own(*given.args, **given.kwargs)

        return known_as(with_forward(network, forward, signature), self)

    def to_json(self) -> dict[str, Any]:
        """Return what an artefact keeps."""
        return {**super().to_json(), "second": True}


def rows_of_call(network: nn.Module, given: Mapping[str, Any], timestep: str) -> RowLists | None:
    """Return which arguments of a call have their rows in lists, or in their second dimension; None if none have."""
    return row_lists(network, given, timestep) or second_rows(network, given, timestep)


@torch.no_grad()
def second_rows(network: nn.Module, given: Mapping[str, Any], timestep: str) -> SecondRows | None:
    """Return which arguments (K, N, ...) have rows in their second dimension; None if none have.

    Of such an argument, an entry more there is a row more of the output, which depends on that entry, as the others do not.

    given: the arguments of a call. Its first tensor beside the timestep has N rows.
    """
    tensors = {n: x for n, x in given.items() if isinstance(x, Tensor) and n != timestep and x.dim()}
    if not tensors:
        return None
    first, *others = tensors
    count = tensors[first].shape[0]
    sure = [n for n in others if is_second(tensors[n], count)]
    may_be = [n for n in others if tensors[n].dim() > 2 and tensors[n].shape[1] == count]
    for names in [sure] if sure else [[n] for n in may_be]:
        if names and _are_second(network, given, names, count):
            return SecondRows(tuple(names), ())
    return None


def _are_second(network: nn.Module, given: Mapping[str, Any], names: Sequence[str], count: int) -> bool:
    """Return True if the second entry of each of these arguments, in their second dimension, is the second row's alone."""

    lists = SecondRows(tuple(names), ())

    def first(x: Any) -> Any:
        return x[:1] if has_rows(x, count) else x

    def twice(x: Any) -> Any:
        return torch.cat([x[:1], x[:1]]) if has_rows(x, count) else x

    def output(call: Mapping[str, Any]) -> Tensor:
        return next(x for x in pytree.tree_leaves(run(view, call)) if isinstance(x, Tensor))

    view, taken = lists.batched(network), lists.taken(given)
    if "return_dict" in signature_of(network).parameters:
        taken["return_dict"] = False
    try:
        alone, both = output(pytree.tree_map(first, taken)), pytree.tree_map(twice, taken)
        for name in names:
            row = taken[name][:1]
            two = output({**both, name: torch.cat([row, -row])})
            if (len(alone), len(two)) != (1, 2) or not only_other(alone[0], two[0], two[1]):
                return False
    except Exception:  # the network's own, of any type
        return False
    return True


def is_second(x: Any, count: int) -> bool:
    """Return True for a tensor (K, N, ...) of `count` rows N, and not K."""
    return isinstance(x, Tensor) and x.dim() > 2 and x.shape[0] != count == x.shape[1]


def _swapped(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() < 2:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TFMQError(f"forward: {name!r} is {found}, but must be a tensor (K, N, ...), with N samples.")
    return x.transpose(0, 1).contiguous()
