"""Capture a network as an fx graph with torch.export."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tfmq_fx.base.ambient import has_values, neutral, tracked
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.base.filled import Filled
from tfmq_fx.base.masked_rows import MaskedRows
from tfmq_fx.base.routed import Routed
from tfmq_fx.base.row_lists import RowLists, known_lists
from tfmq_fx.base.second_rows import rows_of_call
from tfmq_fx.base.signatures import parameters_of, takes_any
from tfmq_fx.base.tracing import numbers_of_sizes, tracing
from tfmq_fx.calibration.ready import require_ready
from tfmq_fx.capturing.agreement import REROUTED, agree, agree_on_other_rows, equal_lists, rows_of
from tfmq_fx.capturing.checks import (
    FixedBatchError,
    check_numbers,
    check_weights,
    refuse_inference_parameters,
    require_by_name,
    require_dynamic_batch,
    require_timestep,
)
from tfmq_fx.capturing.cleaning import cleaning
from tfmq_fx.capturing.exported import exported, lengths_of, plain_graph
from tfmq_fx.capturing.one_row import return_one_row
from tfmq_fx.capturing.wrappers import unwrapped
from tfmq_fx.graph.inputs import choose_timestep, placeholders, require_input
from tfmq_fx.graph.nodes import fixed_size, meta_value
from tfmq_fx.graph.state import Captured, set_state
from tfmq_fx.graph.written import keeps_buffers, own_written_buffers
from tfmq_fx.passes.clean.batch_rows import batch_rows
from tfmq_fx.passes.clean.keep_batch import keep_batch
from tfmq_fx.passes.clean.remove_noops import remove_noops
from tfmq_fx.passes.clean.values_of_copies import values_of_copies
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.temporal.find_temporal import find_temporal

log = logging.getLogger(__name__)


@neutral()
def capture(
    network: nn.Module, example_inputs: Mapping[str, Any], timestep: str | None = None
) -> GraphModule:
    """Capture `network` as a flat GraphModule of aten operators.

    The graph is called with its tensor inputs by name, or in the order of the network's forward.

    example_inputs: forward's arguments by name, those that only `**kwargs` takes among them, and what `*args`
        takes as a list. Tensors, including those inside dicts and lists, become
        inputs of the graph with a dynamic first dimension (batch). Everything else (`return_dict=False`) is
        constant in the graph. The input of a nested tensor joins its path with "_":
        added_cond_kwargs_time_ids. A batch of one is doubled for the capture, because export would treat a
        size of one as a constant.
    timestep: the argument's name; None takes "timestep", or the only tensor of shape () or (N,).

    The graph shares the network's parameters, copies none, and returns what the network returned, with
    dataclass outputs as dicts. dtype and device are fixed by the example. Height, width, frames and numbers of tokens may
    differ from it as far as torch.export can keep them open (`graph.sizes.sizes_of`); a size of one is a constant.

    A network that turns its batch into a number is traced for one row, if it computes each row by itself.

    A wrapper that only passes its arguments on is left out: the names of the parameters are those of the network
    in it. Weights that are functions of parameters alone are computed once (`fold_parameters`).

    Raises TFMQError for a network that is not plain (`require_ready`), a timestep that is missing or not a
    tensor, NaN in parameters or buffers, infinite weights, and a network that torch.export cannot capture, with
    the first line of its message, the line of the network, and a remedy.
    """
    require_ready(network)
    require_by_name(example_inputs)
    found = {name: value for name, (_, value) in leaves(example_inputs).items()}
    timestep = require_timestep(timestep or choose_timestep(found), found)
    refuse_inference_parameters(network)
    check_numbers(network)
    network = unwrapped(network, example_inputs)
    network, example_inputs, found_lists = batched(network, example_inputs, timestep)
    lists = found_lists if found_lists is not None and found_lists.by_row else None
    order = list(parameters_of(network))
    unknown = [n for n in example_inputs if n not in order]
    if unknown and not takes_any(network):
        raise TFMQError(
            f"example input {unknown[0]!r}: {type(network).__name__} takes {nearest_names(unknown[0], order)}."
        )
    example = partial(_example, of_one=_is_one_row(found, timestep))
    inputs = {
        n: pytree.tree_map(example, example_inputs[n]) for n in (*order, *unknown) if n in example_inputs
    }
    by_row = lists is None
    try:
        if (gm := _open_graph(network, inputs, timestep, lists)) is not None:
            return gm
    except FixedBatchError:  # with other sizes fixed, it would be fixed as well
        if by_row and (gm := _graph_of_each_row(network, inputs, timestep)) is not None:
            return gm
        by_row = False
    except TFMQError:  # some network's own numbers are no sizes
        pass
    try:
        return _graph(network, inputs, timestep, all_sizes=False, lists=lists)
    except FixedBatchError:
        if by_row and (gm := _graph_of_each_row(network, inputs, timestep)) is not None:
            return gm
        raise


def _open_graph(
    network: nn.Module,
    inputs: dict[str, Any],
    timestep: str,
    lists: RowLists | None,
    *,
    cut: tuple[str, ...] = (),
) -> GraphModule | None:
    """Return `_graph_of_all_sizes`, with sizes open that the network turns into numbers, such as int(x.shape[1]), if it can be."""
    fixed_batch, gm = None, None
    with tracing(), numbers_of_sizes(network) as asked:
        try:
            gm = _graph_of_all_sizes(network, inputs, timestep, lists, cut=cut)
        except FixedBatchError as error:
            fixed_batch = error
    fixed = set() if gm is None else _fixed_lengths(gm, inputs)
    if asked and (fixed or fixed_batch is not None):
        try:
            other = _graph_of_all_sizes(network, inputs, timestep, lists, cut=cut, numbers=True)
        except TFMQError as error:
            log.info("%s cannot be captured with open numbers: %s", type(network).__name__, error)
        else:
            if other is not None and (gm is None or _fixed_lengths(other, inputs) < fixed):
                return other
    if fixed_batch is not None:
        raise fixed_batch
    return gm


def _fixed_lengths(gm: GraphModule, inputs: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Return the inputs' dimensions that capture asked to keep open, and that are fixed."""
    lengths = lengths_of(inputs)
    shapes = {n: meta_value(node).shape for n, node in placeholders(gm).items()}
    return {
        (n, i)
        for n, shape in shapes.items()
        for i, size in enumerate(shape)
        if i and (fixed := fixed_size(size)) is not None and fixed > 1 and fixed in lengths
    }


def _graph_of_all_sizes(
    network: nn.Module,
    inputs: dict[str, Any],
    timestep: str,
    lists: RowLists | None,
    *,
    cut: tuple[str, ...],
    numbers: bool = False,
) -> GraphModule | None:
    """Return the graph whose sizes are open but for those that its features depend on; None if some would be left."""
    graph = partial(_graph, network, inputs, timestep, all_sizes=True, lists=lists, cut=cut, numbers=numbers)
    gm = graph()
    if fixed := _sizes_of_features(gm, timestep):
        gm = graph(fixed=fixed)
        fixed = _sizes_of_features(gm, timestep)
    return None if fixed else gm


def _graph_of_each_row(network: nn.Module, inputs: dict[str, Any], timestep: str) -> GraphModule | None:
    """Return the graph that computes each row as the network does one alone; None if that is not what it does of several.

    Lists with an equal entry for each row are given as they are, or with one entry if that fails.
    """
    alone = MaskedRows((), ())
    equal = tuple(n for n, x in equal_lists(inputs).items() if len(x) == rows_of(inputs, timestep))
    for cut in dict.fromkeys(((), equal)):
        try:
            return _open_graph(network, inputs, timestep, alone, cut=cut)
        except TFMQError as error:
            log.info("%s cannot be captured row by row: %s", type(network).__name__, error)
    return None


@keeps_buffers
def batched(
    network: nn.Module, example: Mapping[str, Any], timestep: str
) -> tuple[nn.Module, Mapping[str, Any], RowLists | None]:
    """Return the network and its arguments with tensors (N, ...), and which were lists of rows, or had rows elsewhere."""
    if (known := known_lists(network)) is not None:
        return network, known.stacked(example), known
    lists = rows_of_call(network, example, timestep)
    return (
        (network, example, None) if lists is None else (lists.batched(network), lists.taken(example), lists)
    )


def _sizes_of_features(gm: GraphModule, timestep: str) -> set[tuple[str, int]]:
    """Return the inputs' dimensions that move, and are sizes in the temporal block: its features would not depend on the timestep alone."""
    inputs = placeholders(gm)
    rows = {symbol for n in inputs.values() for symbol in _symbols(n, slice(0, 1))}
    if all(_symbols(n) <= rows for n in inputs.values()):
        return set()
    try:
        inside = set(find_temporal(gm, timestep=timestep).nodes)
    except TFMQError:  # there is none; whoever looks for it says so
        return set()
    found = {symbol for n in gm.graph.nodes if n.name in inside for symbol in _symbols(n) - rows}
    return {
        (name, i)
        for name, n in inputs.items()
        if isinstance(value := meta_value(n), Tensor)
        for i in range(value.dim())
        if _symbols(n, slice(i, i + 1)) & found
    }


def _symbols(node: Node, dimensions: slice = slice(None)) -> set[Any]:
    value = meta_value(node)
    sizes: Sequence[Any] = value.shape[dimensions] if isinstance(value, Tensor) else ()
    return {symbol for d in sizes if isinstance(d, torch.SymInt) for symbol in d.node.expr.free_symbols}


def _graph(
    network: nn.Module,
    inputs: dict[str, Any],
    timestep: str,
    *,
    all_sizes: bool,
    lists: RowLists | None,
    fixed: Collection[tuple[str, int]] = (),
    cut: tuple[str, ...] = (),
    numbers: bool = False,
) -> GraphModule:
    """Return the tidy graph of torch.export with plain inputs and outputs.

    all_sizes, fixed, numbers: see `exported`. lists: which inputs the network takes as lists of rows; then the first row is traced.
    cut: the lists of plain values of which that row has the first entry alone.
    """
    passes, traced = cleaning(timestep), network
    if lists is not None:
        at = passes.index(remove_noops) + 1
        passes[at:at] = [values_of_copies, batch_rows]
        traced = lists.first_row(network, inputs, rows=rows_of(inputs, timestep), cut=cut)
    routed, filled = Routed(), Filled(_not_zero(inputs))
    modes = (filled, routed)
    program = exported(
        traced,
        inputs,
        timestep=timestep,
        all_sizes=all_sizes,
        fixed=fixed,
        checked=lists is not None,
        numbers=numbers,
        modes=modes,
    )
    example = {n: x for n, (_, x) in leaves(inputs).items()}
    tensors = {n for n, x in example.items() if isinstance(x, Tensor)}
    gm = plain_graph(program, tensors, functional=lists is not None, owner=type(network).__name__)
    set_state(gm, Captured(timestep=timestep, nonzero=tuple(sorted(filled.asked))))
    for name in tensors:
        require_input(gm, name, argument="example_inputs")
    require_dynamic_batch(gm, network, example)
    gm.graph.eliminate_dead_code()  # such as what was asked of an input, and is known
    tidy = PassManager(passes)
    tidy(gm)
    gm.graph.eliminate_dead_code()
    check_weights(gm)
    share = REROUTED if routed.used else 1.0
    if lists is not None:
        why = "takes lists of samples, and computes something else for several than for each by itself; give it tensors with a batch"
    elif numbers:
        why = "computes something else where int(size) is no number"
    elif routed.used:
        why = (
            "sends tokens to experts in a way that cannot be computed with masks; give its experts all tokens, or hand the passes a "
            "torch.fx.GraphModule you captured yourself"
        )
    else:
        why = ""
    same = not why or agree(gm, example, network, inputs, share=share)
    if not same or (lists is not None and not agree_on_other_rows(gm, network, inputs, share=share)):
        raise TFMQError(f"{type(network).__name__}: {why}.")
    if keep_batch.__name__ in tidy.changed:
        return_one_row(gm, network, inputs, share=share)
    own_written_buffers(gm)
    gm.recompile()
    return gm


def _not_zero(inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that are not 0 everywhere, by value."""
    found = {n: x for n, (_, x) in leaves(inputs).items() if isinstance(x, Tensor) and has_values(x)}
    with unset_fake_temporarily():  # values are read, also where new tensors would have none
        return [n for n, x in found.items() if bool(x.any())]


def _is_one_row(found: Mapping[str, Any], timestep: str) -> bool:
    """Return True if the example's batch is one. Else a first dimension of one is that of a tensor for all rows."""
    t = found[timestep]
    return (
        t.shape[0] == 1
        if t.dim()
        else any(isinstance(x, Tensor) and x.shape[:1] == (1,) for x in found.values())
    )


def _example(x: Any, *, of_one: bool) -> Any:
    """Return a leaf of the example as capture needs it: tensors for autograd, with a batch of at least two.

    of_one: True if the example has one row.
    """
    if not isinstance(x, Tensor):
        return x
    x = tracked(x)
    return torch.cat([x, x]) if of_one and x.dim() > 0 and x.shape[0] == 1 else x
