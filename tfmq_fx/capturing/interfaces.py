"""A captured graph's calling convention, as calls of it and of the network show it: at which sizes and rows they agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.interface import Interface
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.masked_rows import MaskedRows
from tfmq_fx.base.row_lists import RowLists, run
from tfmq_fx.base.stand_ins import StandIn
from tfmq_fx.capturing.agreement import MOST_TRIALS, agrees, equal_lists
from tfmq_fx.graph.inputs import placeholders, timestep_input
from tfmq_fx.graph.sizes import Condition, Size, holds, implied, sizes_in
from tfmq_fx.graph.written import keeps_buffers


def interface_of(
    network: nn.Module,
    gm: GraphModule,
    example: dict[str, Any],
    *,
    perturbed: dict[str, Any] | None = None,
    others: Sequence[Mapping[str, Any]] = (),
    stand_ins: Mapping[str, StandIn] | None = None,
    idle: Sequence[str] = (),
) -> Interface:
    """Return the interface of a network that was captured as `gm`, as calls of the two show it. See `Interface.of`."""
    found = Interface.of(
        network, gm, example, _output_of(network, example), perturbed=perturbed, others=others
    )
    return dataclasses.replace(
        found,
        lists=_lists_of_rows(network, gm, example),
        conditions=_kept_conditions(network, gm, example, found),
        stand_ins={n: x.to_json() for n, x in (stand_ins or {}).items()},
        idle=tuple(idle),
    )


@keeps_buffers
@torch.no_grad()
def _lists_of_rows(network: nn.Module, gm: GraphModule, example: Mapping[str, Any]) -> dict[str, int]:
    """Return the arguments that are lists with an equal entry for each row, such as every sample's size, and their lengths.

    A call with one row more shows which are: the graph, in which they are constants, computes what the network does.
    """
    lists = equal_lists(example)
    if not lists:
        return {}
    tensors = {n: x for n, (_, x) in leaves(example).items() if isinstance(x, Tensor)}
    rows = tensors[_sample(gm)].shape[0] + 1

    def grown(x: Any) -> Any:
        alike = isinstance(x, Tensor) and x.shape[:1] == (rows - 1,)
        return torch.cat([x, x[:1]]) if alike else x

    more = pytree.tree_map(grown, {n: x for n, x in example.items() if n not in lists})
    found = {n: x for n, (_, x) in leaves(more).items()}
    same = agrees(gm, found, network, {**more, **{n: [x[0]] * rows for n, x in lists.items()}})
    return {n: len(x) for n, x in lists.items()} if same else {}


@keeps_buffers
@torch.no_grad()
def _kept_conditions(
    network: nn.Module, gm: GraphModule, example: Mapping[str, Any], face: Interface
) -> tuple[Condition, ...]:
    """Return the interface's conditions on sizes without those that need not hold for rows from lists, whose sizes differ.

    A call of one row at a size that breaks some shows it: the graph computes what the network does. A prompt that is padded to
    a multiple of 32 need not lack as many tokens as the captured one, for instance.
    """
    left = list(face.conditions)
    names = () if face.listed is None else face.listed.ragged
    one = {n: x[:1] if isinstance(x, Tensor) and x.dim() else x for n, x in example.items()}
    found = {n: x for n, (_, x) in leaves(one).items() if isinstance(x, Tensor)}
    now = {(n, i): size for n, x in found.items() for i, size in enumerate(x.shape)}
    for at in [at for at in face.moves() if at[0] in names]:
        needed: list[list[Condition]] = []  # each list has one that must hold
        for size in sorted(range(1, 2 * now[at] + 65), key=lambda size: abs(size - now[at])):
            broken = [c for c in left if at in sizes_in(c) and not holds(c, {**now, at: size})]
            if not broken or any(all(c in broken for c in known) for known in needed):
                continue
            if len(needed) == MOST_TRIALS:
                break
            other = _resized(one[at[0]], at[1], size)
            if agrees(gm, {**found, at[0]: other}, network, {**one, at[0]: other}):
                left = [c for c in left if c not in broken]
            else:
                needed.append(broken)
    short = _short_rows(network, gm, one, face.listed, face.moves()) if face.listed is not None else ()
    return (*_with_ones(network, gm, example, left, face.moves()), *short)


def _with_ones(
    network: nn.Module,
    gm: GraphModule,
    example: Mapping[str, Any],
    conditions: Sequence[Condition],
    moves: Mapping[Size, int],
) -> Sequence[Condition]:
    """Return the conditions on sizes without those that need not hold where a size of the sample is one.

    torch.export assumes of an open size that it is two or more, and does not note where the network asked. A call shows whether
    it computes the same: of a video with one frame.
    """
    found = {n: x for n, (_, x) in leaves(example).items() if isinstance(x, Tensor)}
    now = {(n, i): size for n, x in found.items() for i, size in enumerate(x.shape)}
    for at in [at for at, size in moves.items() if at[0] == _sample(gm) and size > 1]:
        sizes = implied({**now, at: 1}, conditions)
        broken = [c for c in conditions if not holds(c, sizes)]
        if sizes[at] != 1 or not broken or any(c[0] == "Equality" for c in broken):
            continue  # such as one number that two inputs must share
        cut = dict(found)
        for n, i in [other for other, size in sizes.items() if size != now[other]]:
            cut[n] = _resized(cut[n], i, sizes[n, i])
        given = {id(x): cut[n] for n, x in found.items()}
        arguments = pytree.tree_map(lambda x, given=given: given.get(id(x), x), dict(example))
        if agrees(gm, cut, network, arguments):
            conditions = [_or_one(c, at, sizes) if c in broken else c for c in conditions]
    return conditions


def _or_one(condition: Condition, at: Size, sizes: Mapping[Size, int]) -> Condition:
    """Return a condition that need not hold where this size is one, in which it breaks at these sizes."""
    match condition:
        case ["GreaterThan", ["size", name, i], 2] if sizes[name, i] == 1:
            return ["GreaterThan", ["size", name, i], 1]
    return ["Or", ["Equality", ["size", *at], 1], condition]


def _short_rows(
    network: nn.Module,
    gm: GraphModule,
    one: Mapping[str, Any],
    lists: RowLists,
    moves: Mapping[Size, int],
) -> Iterator[Condition]:
    """Yield which lengths below two padded rows must not have: torch.export did not trace those.

    A call with a mask of so many ones shows if the graph computes what the network does. one: its arguments, of one row.
    """
    found = {n: x for n, (_, x) in leaves(one).items() if isinstance(x, Tensor)}
    for name, (dtype, marked) in lists.masks.items() if isinstance(lists, MaskedRows) else ():
        for length in (1, 0):
            mask = torch.zeros(1, found[marked[0]].shape[1], dtype=getattr(torch, dtype))
            mask[:, :length] = 1
            cut = {n: found[n][:, :length] for n in marked}
            given = {**one, name: mask.to(found[marked[0]].device)}
            if all((n, 1) in moves for n in marked) and not agrees(gm, {**found, **cut}, network, given):
                yield from (["GreaterThan", ["size", n, 1], length + 1] for n in marked)
                break


def _sample(gm: GraphModule) -> str:
    """Return the name of the noisy sample: the first input other than the timestep."""
    return next(n for n in placeholders(gm) if n != timestep_input(gm, None).target)


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])


@keeps_buffers
@torch.no_grad()
def _output_of(network: nn.Module, example: dict[str, Any]) -> Any:
    """Return what the network returns by default for the arguments of the capture."""
    return run(network, {k: v for k, v in example.items() if k != "return_dict"})
