"""Capture a network as an fx graph with torch.export."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.passes.infra.pass_base import PassResult
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tfmq_fx.agreement import (
    REROUTED,
    agree,
    agree_on_other_rows,
    agree_on_padding,
    agrees,
    as_dict,
    equal_lists,
    interface_of,
    require_kinds,
    rows_of,
)
from tfmq_fx.artefact.drop_in import VARIANT, Interface
from tfmq_fx.base.ambient import has_values, neutral, tracked
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.base.filled import Filled
from tfmq_fx.base.masked_rows import MaskedRows
from tfmq_fx.base.routed import Routed
from tfmq_fx.base.row_lists import RowLists, known_lists
from tfmq_fx.base.second_rows import rows_of_call
from tfmq_fx.base.signatures import (
    call_of,
    hides_arguments,
    of_names,
    parameters_of,
    signature_of,
    takes_any,
    with_forward,
)
from tfmq_fx.base.tracing import (
    capture_error,
    expect_same_rows,
    graphs_to_log,
    numpy_on_sizes,
    symbolic_lengths,
    tracing,
    without_caches,
)
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.padding import without_padding
from tfmq_fx.calibration.ready import require_ready
from tfmq_fx.graph.inputs import choose_timestep, placeholders, require_input, timestep_input
from tfmq_fx.graph.nodes import attribute, fixed_size, meta_value, schema_arguments
from tfmq_fx.graph.state import Captured, set_state
from tfmq_fx.graph.written import keeps_buffers, own_written_buffers, writing_nodes
from tfmq_fx.passes.clean.batch_rows import batch_rows
from tfmq_fx.passes.clean.flatten_timestep import flatten_timestep
from tfmq_fx.passes.clean.fold_parameters import fold_parameters
from tfmq_fx.passes.clean.inline_regions import inline_regions
from tfmq_fx.passes.clean.linear_matmuls import linear_matmuls
from tfmq_fx.passes.clean.literal_dtypes import literal_dtypes
from tfmq_fx.passes.clean.merge_variants import merge_variants
from tfmq_fx.passes.clean.remove_noops import remove_noops
from tfmq_fx.passes.clean.root_batch_size import root_batch_size
from tfmq_fx.passes.clean.values_of_copies import values_of_copies
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.temporal.find_temporal import find_temporal
from tfmq_fx.passes.temporal.flatten_entries import flatten_entries
from tfmq_fx.passes.temporal.sink_repeats import sink_repeats
from tfmq_fx.passes.temporal.undo_joins import undo_joins

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
    found = {name: value for name, (_, value) in leaves(example_inputs).items()}
    timestep = _require_timestep(timestep or choose_timestep(found), found)
    _refuse_inference_parameters(network)
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
        if (gm := _graph_of_all_sizes(network, inputs, timestep, lists)) is not None:
            return gm
    except _FixedBatchError:  # with other sizes fixed, it would be fixed as well
        if by_row and (gm := _graph_of_each_row(network, inputs, timestep)) is not None:
            return gm
        by_row = False
    except TFMQError:  # some network's own numbers are no sizes
        pass
    try:
        return _graph(network, inputs, timestep, all_sizes=False, lists=lists)
    except _FixedBatchError:
        if by_row and (gm := _graph_of_each_row(network, inputs, timestep)) is not None:
            return gm
        raise


class _FixedBatchError(TFMQError):
    """A network turns its batch into a number."""


def _graph_of_all_sizes(
    network: nn.Module, inputs: dict[str, Any], timestep: str, lists: RowLists | None
) -> GraphModule | None:
    """Return the graph whose sizes are open but for those that its features depend on; None if some would be left."""
    gm = _graph(network, inputs, timestep, all_sizes=True, lists=lists)
    if fixed := _sizes_of_features(gm, timestep):
        gm = _graph(network, inputs, timestep, all_sizes=True, fixed=fixed, lists=lists)
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
            gm = _graph(network, inputs, timestep, all_sizes=True, lists=alone, cut=cut)
        except TFMQError as error:
            log.info("%s cannot be captured row by row: %s", type(network).__name__, error)
            continue
        return None if _sizes_of_features(gm, timestep) else gm
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
) -> GraphModule:
    """Return the tidy graph of torch.export with plain inputs and outputs.

    all_sizes, fixed: see `_exported`. lists: which inputs the network takes as lists of rows; then the first row is traced.
    cut: the lists of plain values of which that row has the first entry alone.
    """
    passes, traced = cleaning(timestep), network
    if lists is not None:
        at = passes.index(remove_noops) + 1
        passes[at:at] = [values_of_copies, batch_rows]
        traced = lists.first_row(network, inputs, rows=rows_of(inputs, timestep), cut=cut)
    routed, filled = Routed(), Filled(_not_zero(inputs))
    modes = (filled, routed)
    program = _exported(
        traced,
        inputs,
        timestep=timestep,
        all_sizes=all_sizes,
        fixed=fixed,
        checked=lists is not None,
        modes=modes,
    )
    gm = _module(program)
    if writing_nodes(gm) or (lists is not None and _writes(program.graph)):
        # The same operators, without writes. A functional copy has no derivative.
        try:
            program = program.run_decompositions({torch.ops.aten.copy.default: _copied})
        except Exception as error:  # torch raises many types
            raise capture_error(type(network).__name__, error, runs=True) from None
        gm = _module(program)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    example = {n: x for n, (_, x) in leaves(inputs).items()}
    tensors = {n for n, x in example.items() if isinstance(x, Tensor)}
    gm = _plain_signature(gm, tensors, out_spec)
    set_state(gm, Captured(timestep=timestep, nonzero=tuple(sorted(filled.asked))))
    for name in tensors:
        require_input(gm, name, argument="example_inputs")
    _require_dynamic_batch(gm, network, example)
    _track_constants(gm)
    gm.graph.eliminate_dead_code()  # such as what was asked of an input, and is known
    PassManager(passes)(gm)
    gm.graph.eliminate_dead_code()
    _check_weights(gm)
    share = REROUTED if routed.used else 1.0
    if lists is not None and not (
        agree(gm, example, network, inputs, share=share)
        and agree_on_other_rows(gm, network, inputs, share=share)
    ):
        raise TFMQError(
            f"{type(network).__name__}: takes lists of samples, and computes something else for several than for each by itself; "
            "give it tensors with a batch."
        )
    if routed.used and lists is None and not agree(gm, example, network, inputs, share=share):
        raise TFMQError(
            f"{type(network).__name__}: sends tokens to experts in a way that cannot be computed with masks; give its experts all "
            "tokens, or hand the passes a torch.fx.GraphModule you captured yourself."
        )
    own_written_buffers(gm)
    gm.recompile()
    return gm


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    return source.to(x.dtype).expand(x.shape)


def _module(program: torch.export.ExportedProgram) -> GraphModule:
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def _not_zero(inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that are not 0 everywhere, by value."""
    found = {n: x for n, (_, x) in leaves(inputs).items() if isinstance(x, Tensor) and has_values(x)}
    with unset_fake_temporarily():  # values are read, also where new tensors would have none
        return [n for n, x in found.items() if bool(x.any())]


def _writes(graph: Graph) -> bool:
    """Return True if a graph has operators that change their inputs."""
    return any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in graph.nodes)


def _require_timestep(timestep: str, found: Mapping[str, Any]) -> str:
    """Return the name `timestep`. Raises TFMQError unless the example input of that name is a tensor."""
    if timestep not in found:
        raise TFMQError(
            f"timestep={timestep!r}: not among the example inputs {nearest_names(timestep, found)}."
        )
    if not isinstance(found[timestep], Tensor):
        raise TFMQError(
            f"timestep={timestep!r}: a Python {type(found[timestep]).__name__} ({found[timestep]!r}) would be baked "
            "into the graph as a constant; give a tensor."
        )
    return timestep


@keeps_buffers
def unwrapped(network: nn.Module, example_inputs: Mapping[str, Any]) -> nn.Module:
    """Return the network in wrappers that pass all arguments on and return what they get, or the network itself.

    Whether a wrapper computes anything itself is seen by calling it once: DataParallel and averages of weights do not.
    """
    while hides_arguments(network) and (inner := _only_callee(network, example_inputs)) is not None:
        network = inner
    return network


@torch.no_grad()
def _only_callee(wrapper: nn.Module, example_inputs: Mapping[str, Any]) -> nn.Module | None:
    """Return the child that gets all the wrapper's arguments and makes all its outputs; None if there is none."""
    seen: list[tuple[nn.Module, Any, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((module, (args, kwargs), output))

    given = call_of(wrapper, pytree.tree_map(lambda x: x, dict(example_inputs)))
    handles = [m.register_forward_hook(keep, with_kwargs=True) for m in wrapper.children()]
    try:
        output = wrapper(*given[0], **given[1])
    except Exception:  # capture runs into it as well, and says why
        return None
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) == 1 and _same_tensors(seen[0][1], given) and _same_tensors(seen[0][2], output):
        return seen[0][0]
    return None


def _same_tensors(a: Any, b: Any) -> bool:
    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _exported(
    network: nn.Module,
    inputs: dict[str, Any],
    *,
    timestep: str,
    all_sizes: bool,
    fixed: Collection[tuple[str, int]],
    checked: bool,
    modes: tuple[Filled, Routed],
) -> torch.export.ExportedProgram:
    """Export the network with a dynamic batch.

    inputs: its arguments by name. all_sizes: keep other sizes open, too, but for those of these inputs of the graph and dimensions:
    fixed. checked: whether the graph will be compared with the network. modes: those that follow what the network reads as numbers.
    """
    filled, routed = modes
    lengths = _lengths(inputs) if all_sizes else set()
    rows = _inputs_with_rows(inputs, timestep) if all_sizes else []

    def called(given: Mapping[str, Any]) -> None:
        filled.name_arguments(given)
        found = leaves(given)
        expect_same_rows([found[name][1] for name in rows])

    constant = {id(x): {i for n, i in fixed if n == name} for name, (_, x) in leaves(inputs).items()}
    dynamic = {
        n: pytree.tree_map(partial(_dynamic, lengths=set() if n == timestep else lengths, fixed=constant), x)
        for n, x in inputs.items()
    }
    try:
        # Without no_grad, activation-checkpoint code hides operators inside submodules.
        with (
            tracing(),
            graphs_to_log(),
            numpy_on_sizes(),
            symbolic_lengths(network, sets=checked),
            without_caches(network),
            torch.no_grad(),
            _Traceable(),
            filled,
            routed,
        ):
            named = _by_name(network, inputs, called)
            return torch.export.export(named, (), inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises many types
        runs = _runs(network, *call_of(network, inputs))
        # Not the cause: torch's own text may have a thousand lines.
        raise capture_error(type(network).__name__, error, runs=runs) from None


def _inputs_with_rows(inputs: Mapping[str, Any], timestep: str) -> list[str]:
    """Return the tensors that have as many rows as the timestep, by name: those that `Interface` takes for the batch."""
    found = {n: x for n, (_, x) in leaves(inputs).items() if isinstance(x, Tensor) and x.dim()}
    return [n for n, x in found.items() if timestep in found and len(x) == len(found[timestep])]


def _lengths(inputs: Mapping[str, Any]) -> set[int]:
    """Return the sizes of everything that has more than rows of numbers: heights, widths, frames, numbers of tokens."""
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    return {size for x in tensors if x.dim() > 2 for size in x.shape[1:]}


def _by_name(
    network: nn.Module, names: Iterable[str], called: Callable[[Mapping[str, Any]], None]
) -> nn.Module:
    """Return the same network, whose forward takes these arguments by name, and gives them to `called` first.

    torch.export numbers what only *args take, and torch 2.11 gives what only **kwargs take no dynamic batch.
    """

    def forward(own: Callable[..., Any], /, **given: Any) -> Any:
        called(given)
        args, kwargs = call_of(network, given)
        return as_dict(own(*args, **kwargs))

    return with_forward(network, forward, of_names(names))


def _dynamic(x: Any, *, lengths: Collection[int], fixed: Mapping[int, Collection[int]]) -> Any:
    """Return the dimensions that may differ, in torch.export's format: the first, and those of these sizes.

    fixed: a tensor's id -> its dimensions that may not. torch.export would make a constant of a size of one, and warn.
    """
    if not isinstance(x, Tensor) or not x.dim():
        return None
    stays = fixed.get(id(x), ())
    more = (i for i in range(1, x.dim()) if x.shape[i] > 1 and x.shape[i] in lengths and i not in stays)
    return dict.fromkeys((0, *more), torch.export.Dim.AUTO)


@keeps_buffers
@torch.no_grad()
def _runs(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if the network computes something from these inputs."""
    args, kwargs = pytree.tree_map(lambda x: x, (args, kwargs))
    try:
        network(*args, **kwargs)
    except Exception:
        return False
    return True


def cleaning(timestep: str) -> list[Callable[[GraphModule], PassResult]]:
    """Return the passes that clean a captured graph, in the order in which they run.

    The graph's results stay bitwise equal, but for a few roundings where the block's layers get fewer rows.
    """
    return [
        inline_regions,
        remove_noops,
        undo_joins,
        literal_dtypes,
        partial(merge_variants, kinds=VARIANT),
        partial(flatten_timestep, timestep=timestep),
        partial(root_batch_size, timestep=timestep),
        linear_matmuls,
        fold_parameters,
        partial(sink_repeats, timestep=timestep),
        partial(flatten_entries, timestep=timestep),
    ]


class _Traceable(TorchFunctionMode):
    """A mode that computes what torch.export does not trace as we need it by other operators, with the same values.

    x.repeat_interleave(n, dim): by views, as torch 2.11 would turn the size that it repeats into a constant.
    x.fill_diagonal_(value) of a matrix: by a mask, as its own as_strided cannot be traced without writes.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.repeat_interleave, Tensor.repeat_interleave) and len(args) > 1:
            x, repeats, *rest = args
            dim = rest[0] if rest else kwargs.get("dim")
            if isinstance(repeats, (int, torch.SymInt)) and isinstance(dim, int) and x.dim():
                dim %= x.dim()
                shape: list[int | torch.SymInt] = [-1] * (x.dim() + 1)
                shape[dim + 1] = repeats
                return x.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)
        if func is Tensor.fill_diagonal_ and len(args) == 2 and not kwargs and args[0].dim() == 2:
            x, value = args
            rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
            return x.masked_fill_(rows[:, None] == columns, value)
        return func(*args, **kwargs)


def _require_dynamic_batch(gm: GraphModule, network: nn.Module, example: Mapping[str, Any]) -> None:
    """Raise TFMQError if an input's batch became a constant.

    Such a graph would fail, or be wrong, at any other batch size. example: the inputs of the capture, by flat
    name.
    """
    values = {n: node.meta["val"] for n, node in placeholders(gm).items()}
    sizes = {n: example[n].shape[0] for n in values if example[n].dim()}
    batch = sizes.get(timestep := str(timestep_input(gm, None).target), rows_of(example, timestep))
    for name, size in sizes.items():
        if size == batch and fixed_size(values[name].shape[0]) is not None:
            raise _FixedBatchError(
                f"torch.export fixed the batch of {name!r} at {batch}: {type(network).__name__} turns it into a Python number, as "
                f"int({name}.shape[0]) does, or hard-codes it; use {name}.shape[0]. (If its first dimension is not a batch, give an "
                "example with another batch size.)"
            )
    of_batch = next((values[n].shape[0] for n, size in sizes.items() if size == batch), None)
    if isinstance(of_batch, torch.SymInt) and (node := _split_by_batch(gm, of_batch)) is not None:
        raise _FixedBatchError(
            f"torch.export fixed the number of pieces of {node.name!r}: {type(network).__name__} splits "
            "its rows into pieces of a size, more for a larger batch; compute them at once."
        )


def _split_by_batch(gm: GraphModule, batch: torch.SymInt) -> Node | None:
    """Return a split into more pieces for a larger batch, of which the graph has as many as for the example's; None if there is none."""
    symbols = batch.node.expr.free_symbols

    def size(value: Any, times: int) -> int:
        value = meta_value(value) if isinstance(value, Node) else value
        if not isinstance(value, torch.SymInt):
            return int(value)
        hint: Any = value.node.hint
        return int(hint) * (times if value.node.expr.free_symbols & symbols else 1)

    def splits(node: Node) -> bool:
        given: tuple[Any, ...] = node.args
        x, each, *rest = given
        whole = meta_value(x).shape[rest[0] if rest else 0]
        return len({-(-size(whole, times) // size(each, times)) for times in (1, 2, 16)}) > 1

    found = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.split.Tensor)
    return next(filter(splits, found), None)


def _refuse_inference_parameters(network: nn.Module) -> None:
    """Raise TFMQError naming the first parameter or buffer that was made in inference_mode: export cannot take it."""
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        if p.is_inference():
            raise TFMQError(
                f"weight {name}: was made inside torch.inference_mode, and torch.export cannot capture such weights; "
                "build or load the network outside of it."
            )


def check_numbers(network: nn.Module) -> None:
    """Raise TFMQError naming the first parameter or buffer that holds NaN.

    Infinity has its uses outside weights: in masks.
    """
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        if _is_real(p) and torch.isnan(p).any():
            raise _not_finite(name)


def _check_weights(gm: GraphModule) -> None:
    """Raise TFMQError naming the first weight, bias or running statistic of an operator that is not finite."""
    for node in gm.graph.nodes:
        for name, value in schema_arguments(node):
            if name in _WEIGHTS and isinstance(value, Node) and value.op == "get_attr":
                tensor = attribute(gm, str(value.target))
                if _is_real(tensor) and not torch.isfinite(tensor).all():
                    raise _not_finite(str(value.target))


_WEIGHTS = ("weight", "bias", "running_mean", "running_var")  # what aten's schemas call them


def _is_real(x: Tensor) -> bool:
    """Return True for floating-point numbers that are in memory."""
    return x.is_floating_point() and has_values(x)


def _not_finite(name: str) -> TFMQError:
    return TFMQError(f"weight {name}: holds NaN or infinite values; quantizing it would give wrong pictures.")


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


def _track_constants(gm: GraphModule) -> None:
    """Replace tensors that the network made in inference_mode, such as cached tables, by some on the same memory."""
    for module in gm.modules():
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = tracked(value)


def _plain_signature(gm: GraphModule, tensors: set[str], out_spec: pytree.TreeSpec) -> GraphModule:
    """Replace export's pytree calling convention by plain named inputs and a plain nested output."""
    graph: Graph = gm.graph
    for node in graph.find_nodes(op="placeholder"):
        if str(node.target) not in tensors:
            graph.erase_node(node)
    output = graph.output_node()
    flat = pytree.tree_leaves(output.args[0], is_leaf=lambda x: isinstance(x, Node))
    output.args = (_plain(pytree.tree_unflatten(flat, out_spec)),)
    graph.set_codegen(CodeGen())
    gm = GraphModule(gm, graph)  # also sheds exported modules' refusal of train() and eval()
    gm.meta = {}
    return gm


def _plain(value: Any) -> Any:
    """Return an output of dicts, lists and tuples alone: fields by name are dicts, named tuples are tuples."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(v) for v in value)
    return value


def captured(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any], CalibrationSet]:
    """Capture on rows of the calibration set. Return the graph, the arguments of the capture, and the set as the graph takes it.

    A network that reads the lengths of padded rows as numbers is captured without padding, if it computes the same so.
    """
    try:
        return *_captured(network, calibration, timestep), calibration
    except TFMQError:
        found = captured_without_padding(network, calibration, timestep)
        if found is None:
            raise
        return found


def described(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[nn.Module, GraphModule, Interface, CalibrationSet]:
    """Capture a network on rows of a calibration set. Return it without wrappers, its graph, how it is called, and what `captured` does."""
    network = unwrapped(network, calibration.arguments(slice(0, 2), beside=network))
    gm, example, calibration = captured(network, calibration, timestep)
    perturbed, others = calibration.perturbation, calibration.others
    interface = interface_of(
        calibration.row_wise(network), gm, example,
        perturbed=None if perturbed is None else perturbed.to_json(), others=others,
    )  # fmt: skip
    return network, gm, interface, calibration


def captured_without_padding(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any], CalibrationSet] | None:
    """Return what `captured` does of a set that is cut to the lengths of its rows; None if the network computes something else so."""
    for zeros in (False, True):
        cut = without_padding(network, calibration, zeros=zeros)
        if cut is not None and (found := _captured_cut(network, cut, calibration, timestep)) is not None:
            return *found, cut
    return None


def _captured_cut(
    network: nn.Module, cut: CalibrationSet, padded: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any]] | None:
    """Return what `_captured` does of rows without padding; None if they cannot be captured, or the graph is not right."""
    try:
        gm, example = _captured(network, cut, timestep)
    except TFMQError as error:
        log.info("%s cannot be captured without padding: %s", type(network).__name__, error)
        return None
    return (gm, example) if agree_on_padding(gm, network, cut, padded) else None


def _captured(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any]]:
    """Return the graph and the arguments of the capture.

    As many rows as no tensor has of anything else (entries, frames), so that the two can be told apart.
    """
    taken = {x.shape[0] for x in calibration.constants.values() if isinstance(x, Tensor) and x.dim()}
    taken |= {size for x in calibration.tensors.values() for size in x.shape[1:]}
    count = next(n for n in itertools.count(2) if n not in taken)
    example = calibration.example(count, beside=network)
    if "return_dict" in parameters_of(network):
        example["return_dict"] = False
    gm, example = capture_rows(calibration.row_wise(network), example, timestep)
    if calibration.others:
        require_kinds(gm, network, calibration)
    return gm, example


def capture_rows(
    network: nn.Module, example: dict[str, Any], timestep: str
) -> tuple[GraphModule, dict[str, Any]]:
    """Capture on rows with a timestep each, (N,), or on one timestep, (), if the network takes one per call.

    A network that turns the number of timesteps into a Python number gets its one timestep as (1,), for all rows.

    Returns the graph and the arguments of the capture.
    """
    network, given, _ = batched(network, example, timestep)
    example = dict(given)
    try:
        return capture(network, example, timestep=timestep), example
    except TFMQError:
        if not isinstance(example.get(timestep), Tensor) or example[timestep].dim() != 1:
            raise
        one = {**example, timestep: example[timestep][0]}
        try:
            return capture(network, one, timestep=timestep), one
        except TFMQError:
            pass  # the first error is the one to show
        try:
            gm = capture(_with_one_timestep(network, timestep), one, timestep=timestep)
        except TFMQError:
            gm = None
        if gm is not None and _computes(gm, network, one):
            return gm, example
        raise


def _with_one_timestep(network: nn.Module, timestep: str) -> nn.Module:
    """Return the same network for a timestep of shape (), which it gets as (1,)."""
    signature = signature_of(network)

    def forward(own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments[timestep] = given.arguments[timestep].reshape(1)
        return own(*given.args, **given.kwargs)

    return with_forward(network, forward, signature)


@keeps_buffers
@torch.no_grad()
def _computes(gm: GraphModule, network: nn.Module, one: Mapping[str, Any]) -> bool:
    """Return True if the graph computes what the network does with that timestep for every row.

    One timestep need not be the same as one for each row: a network may read its batch from there.
    """
    found = {n: x for n, (_, x) in leaves(one).items()}
    timestep = str(timestep_input(gm, None).target)
    rows = next(found[n].shape[0] for n in placeholders(gm) if n != timestep and found[n].dim())
    return agrees(gm, found, network, {**one, timestep: found[timestep].expand(rows)})
