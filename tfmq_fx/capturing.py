"""Capture a network as an fx graph with torch.export."""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.passes.infra.pass_base import PassResult
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tfmq_fx.base.ambient import neutral, tracked
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.ready import require_ready
from tfmq_fx.graph.inputs import choose_timestep, placeholders, require_input, timestep_input
from tfmq_fx.graph.nodes import fixed_size
from tfmq_fx.graph.state import Captured, set_state
from tfmq_fx.graph.written import own_written_buffers
from tfmq_fx.passes.clean.inline_regions import inline_regions
from tfmq_fx.passes.clean.literal_dtypes import literal_dtypes
from tfmq_fx.passes.clean.remove_noops import remove_noops
from tfmq_fx.passes.clean.root_batch_size import root_batch_size
from tfmq_fx.passes.pass_manager import PassManager


@neutral()
def capture(
    network: nn.Module, example_inputs: Mapping[str, Any], timestep: str | None = None
) -> GraphModule:
    """Capture `network` as a flat GraphModule of aten operators.

    The graph is called with its tensor inputs by name, or in the order of the network's forward.

    example_inputs: forward's keyword arguments. Tensors, including those inside dicts and lists, become
        inputs of the graph with a dynamic first dimension (batch). Everything else (`return_dict=False`) is
        constant in the graph. The input of a nested tensor joins its path with "_":
        added_cond_kwargs_time_ids. A batch of one is doubled for the capture, because export would treat a
        size of one as a constant.
    timestep: the argument's name; None takes "timestep", or the only tensor of shape () or (N,).

    The graph shares the network's parameters, copies none, and returns what the network returned, with
    dataclass outputs as dicts. dtype, device, height and width are fixed by the example.

    Raises TFMQError for a network that is not plain (`require_ready`), a timestep that is missing or not a tensor, a network whose
    control flow depends on data (with export's own message), and NaN or infinite parameters.
    """
    require_ready(network)
    found = {name: value for name, (_, value) in leaves(example_inputs).items()}
    tensors = {n for n, x in found.items() if isinstance(x, Tensor)}
    timestep = timestep or choose_timestep(found)
    if timestep not in found:
        raise TFMQError(
            f"timestep={timestep!r}: not among the example inputs {nearest_names(timestep, found)}."
        )
    if timestep not in tensors:
        raise TFMQError(
            f"timestep={timestep!r}: a Python {type(found[timestep]).__name__} ({found[timestep]!r}) would be baked "
            "into the graph as a constant; give a tensor."
        )
    _refuse_inference_parameters(network)
    check_finite(network)
    order = list(inspect.signature(network.forward).parameters)
    unknown = [n for n in example_inputs if n not in order]
    if unknown:
        raise TFMQError(
            f"example input {unknown[0]!r}: {type(network).__name__} takes {nearest_names(unknown[0], order)}."
        )
    inputs = {n: pytree.tree_map(_example, example_inputs[n]) for n in order if n in example_inputs}
    dynamic = pytree.tree_map(_dynamic_batch, inputs)
    try:
        # Without no_grad, activation-checkpoint code hides operators inside submodules.
        with torch.no_grad(), _SymbolicRepeats():
            program = torch.export.export(network, (), inputs, dynamic_shapes=dynamic, strict=False)
            gm = program.module(check_guards=False)
    except Exception as error:  # torch.export raises many types; the user needs its message and a remedy
        raise TFMQError(
            f"torch.export cannot capture {type(network).__name__}: {type(error).__name__}: {_words(error)} "
            "Remove the data-dependent control flow it names (torch.where, or a constant), or hand the passes a "
            "torch.fx.GraphModule you captured yourself."
        ) from error
    assert isinstance(gm, GraphModule)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    gm = _plain_signature(gm, tensors, out_spec)
    set_state(gm, Captured(timestep=timestep))
    for name in tensors:
        require_input(gm, name, argument="example_inputs")
    _require_dynamic_batch(gm, network, {n: x for n, (_, x) in leaves(inputs).items()})
    _track_constants(gm)
    PassManager(cleaning(timestep))(gm)
    gm.graph.eliminate_dead_code()
    own_written_buffers(gm)
    gm.recompile()
    return gm


def cleaning(timestep: str) -> list[Callable[[GraphModule], PassResult]]:
    """Return the passes that clean a captured graph, in the order in which they run.

    The graph's results stay bitwise equal.
    """
    return [inline_regions, remove_noops, literal_dtypes, partial(root_batch_size, timestep=timestep)]


class _SymbolicRepeats(TorchFunctionMode):
    """A mode that computes x.repeat_interleave(n, dim) by views, with the same values.

    torch 2.11 would turn the size that it repeats into a constant.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.repeat_interleave, Tensor.repeat_interleave) and len(args) > 1:
            x, repeats, *rest = args
            dim = rest[0] if rest else kwargs.get("dim")
            if isinstance(repeats, int) and isinstance(dim, int) and x.dim():
                dim %= x.dim()
                shape = [-1] * (x.dim() + 1)
                shape[dim + 1] = repeats
                return x.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)
        return func(*args, **kwargs)


def _require_dynamic_batch(gm: GraphModule, network: nn.Module, example: Mapping[str, Any]) -> None:
    """Raise TFMQError if an input's batch became a constant.

    Such a graph would fail, or be wrong, at any other batch size. example: the inputs of the capture, by flat
    name.
    """
    values = {n: node.meta["val"] for n, node in placeholders(gm).items()}
    sizes = {n: example[n].shape[0] for n in values if example[n].dim()}
    batch = sizes.get(str(timestep_input(gm, None).target), max(sizes.values(), default=0))
    for name, size in sizes.items():
        if size == batch and fixed_size(values[name].shape[0]) is not None:
            raise TFMQError(
                f"torch.export fixed the batch of {name!r} at {batch}: {type(network).__name__} turns it into a Python number, as "
                f"len({name}) does, or hard-codes it; use {name}.shape[0]. (If its first dimension is not a batch, give an "
                "example with another batch size.)"
            )


def _refuse_inference_parameters(network: nn.Module) -> None:
    """Raise TFMQError naming the first parameter or buffer that was made in inference_mode: export cannot take it."""
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        if p.is_inference():
            raise TFMQError(
                f"weight {name}: was made inside torch.inference_mode, and torch.export cannot capture such weights; "
                "build or load the network outside of it."
            )


def check_finite(network: nn.Module) -> None:
    """Raise TFMQError naming the first parameter or buffer that holds NaN or infinity."""
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        if (
            p.is_floating_point()
            and not p.is_meta
            and not isinstance(p, FakeTensor)
            and not torch.isfinite(p).all()
        ):
            raise TFMQError(
                f"weight {name}: holds NaN or infinite values; quantizing it would give wrong pictures."
            )


def _dynamic_batch(x: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.dim() > 0 else None


def _words(error: Exception) -> str:
    """Return the first line of export's message, and the line of the network where it failed."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    named = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.+)', text)
    where = [
        f"{f}:{line} in {function}: {code.strip()}" for f, line, function, code in named if not _is_library(f)
    ]
    where = where or [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in frames]
    return f"{first} At {where[-1]}." if where else first


def _is_library(file: str) -> bool:
    return f"{os.sep}torch{os.sep}" in file or file.startswith("<") or os.path.dirname(__file__) in file


def _example(x: Any) -> Any:
    """Return a leaf of the example as capture needs it: tensors for autograd, with a batch of at least two."""
    if not isinstance(x, Tensor):
        return x
    x = tracked(x)
    return torch.cat([x, x]) if x.dim() > 0 and x.shape[0] == 1 else x


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
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    return value


def captured(
    network: nn.Module, calibration: CalibrationSet, timestep: str
) -> tuple[GraphModule, dict[str, Any]]:
    """Capture on the first rows of the calibration set. Return the graph and the arguments of the capture."""
    example = calibration.arguments(slice(0, 2), beside=network)
    if "return_dict" in inspect.signature(network.forward).parameters:
        example["return_dict"] = False
    return capture_rows(network, example, timestep)


def capture_rows(
    network: nn.Module, example: dict[str, Any], timestep: str
) -> tuple[GraphModule, dict[str, Any]]:
    """Capture on rows with a timestep each, (N,), or on one timestep, (), if the network takes one per call.

    Returns the graph and the arguments of the capture.
    """
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
        raise
