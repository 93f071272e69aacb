"""Run torch.export on a network: with an open batch and open sizes, and a plain signature."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tfmq_fx.base.ambient import tracked
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.filled import Filled
from tfmq_fx.base.routed import Routed
from tfmq_fx.base.signatures import call_of, of_names, with_forward
from tfmq_fx.base.tracing import (
    capture_error,
    expect_same_rows,
    graphs_to_log,
    numpy_on_sizes,
    symbolic_lengths,
    tracing,
    without_caches,
)
from tfmq_fx.capturing.agreement import as_dict
from tfmq_fx.graph.written import keeps_buffers, writing_nodes


def exported(
    network: nn.Module,
    inputs: dict[str, Any],
    *,
    timestep: str,
    all_sizes: bool,
    fixed: Collection[tuple[str, int]],
    checked: bool,
    numbers: bool,
    modes: tuple[Filled, Routed],
) -> torch.export.ExportedProgram:
    """Export the network with a dynamic batch.

    inputs: its arguments by name. all_sizes: keep other sizes open, too, but for those of these inputs of the graph and dimensions:
    fixed. checked: whether the graph will be compared with the network. numbers: see `symbolic_lengths`. modes: those that follow what
    the network reads as numbers.
    """
    filled, routed = modes
    lengths = lengths_of(inputs) if all_sizes else set()
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
            symbolic_lengths(network, sets=checked, numbers=numbers),
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


def lengths_of(inputs: Mapping[str, Any]) -> set[int]:
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


class _Traceable(TorchFunctionMode):
    """A mode that computes what torch.export does not trace as we need it by other operators, with the same values.

    x.repeat_interleave(n, dim): by views, as torch 2.11 would turn the size that it repeats into a constant.
    x.fill_diagonal_(value) of a matrix: by a mask, as its own as_strided cannot be traced without writes.
    torch.tensor(n) and torch.as_tensor(n) of a size: by scalar_tensor, as they would turn it into a constant.
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
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], torch.SymInt):
            kind = kwargs.get("dtype") or torch.int64
            return torch.scalar_tensor(args[0], dtype=kind, device=kwargs.get("device"))
        if func is Tensor.fill_diagonal_ and len(args) == 2 and not kwargs and args[0].dim() == 2:
            x, value = args
            rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
            return x.masked_fill_(rows[:, None] == columns, value)
        return func(*args, **kwargs)


def plain_graph(
    program: torch.export.ExportedProgram, tensors: Collection[str], *, functional: bool, owner: str
) -> GraphModule:
    """Return an exported program as a graph with plain named inputs and a plain nested output, without writes to inputs and views.

    tensors: the inputs that it has. functional: without writes of any kind. owner: the network's class, for messages.
    """
    gm = _module(program)
    if writing_nodes(gm) or (functional and _writes(program.graph)):
        # The same operators, without writes. A functional copy has no derivative.
        try:
            program = program.run_decompositions({torch.ops.aten.copy.default: _copied})
        except Exception as error:  # torch raises many types
            raise capture_error(owner, error, runs=True) from None
        gm = _module(program)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
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
    _track_constants(gm)
    return gm


def _module(program: torch.export.ExportedProgram) -> GraphModule:
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    return source.to(x.dtype).expand(x.shape)


def _writes(graph: Graph) -> bool:
    """Return True if a graph has operators that change their inputs."""
    return any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in graph.nodes)


def _plain(value: Any) -> Any:
    """Return an output of dicts, lists and tuples alone: fields by name are dicts, named tuples are tuples."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(v) for v in value)
    return value


def _track_constants(gm: GraphModule) -> None:
    """Replace tensors that the network made in inference_mode, such as cached tables, by some on the same memory."""
    for module in gm.modules():
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = tracked(value)
