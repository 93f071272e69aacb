"""Return the quantized graph as one flat graph: torch.export's program, or without its trace."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.quantized_graph import QuantizedGraph, example_inputs
from tfmq_fx.base.signatures import of_names, with_forward
from tfmq_fx.base.tracing import expect_same_rows, tracing
from tfmq_fx.graph.fakes import set_fake_values
from tfmq_fx.graph.nodes import aten, fresh, mutated_inputs, paste, put_in_place
from tfmq_fx.graph.sizes import Condition, holds
from tfmq_fx.passes.int8.decompose import Table, decompose


@tracing()
def exported(model: QuantizedGraph, *, checked: bool = False) -> torch.export.ExportedProgram:
    """Return the quantized graph as a flat, functional program with named inputs and any batch size.

    checked: let the program refuse sizes that break what the capture assumed of them.
    """
    inputs, dynamic = example_inputs(model, batch=2), dynamic_shapes(model)
    network = _of_known_sizes(model, model.interface.conditions if checked else ())
    with torch.no_grad():
        return torch.export.export(network, (), inputs, dynamic_shapes=dynamic, strict=False)


def _of_known_sizes(model: QuantizedGraph, conditions: Iterable[Condition]) -> nn.Module:
    """Return the graph, which first asks whether its sizes are such as it takes: a trace notes what is asked of them."""
    names, same, moves = list(model.interface.inputs), nn.Module(), model.interface.moves()
    rows = [n for n, s in model.interface.inputs.items() if s["shape"][:1] == [None] and (n, 0) not in moves]
    # It holds what the graph does, by the same names: of a graph module itself, export would run the graph alone.
    for held in ("_parameters", "_buffers", "_modules"):
        vars(same)[held] = vars(model.network)[held]

    def forward(_own: Callable[..., Any], /, **given: Tensor) -> Any:
        sizes = {(n, i): size for n, x in given.items() for i, size in enumerate(x.shape)}
        expect_same_rows([given[n] for n in rows])
        for condition in conditions:
            holds(condition, sizes)
        return model.network(*[given[n] for n in names])

    return with_forward(same, forward, of_names(names))


def graph_of(program: torch.export.ExportedProgram) -> GraphModule:
    """Return the graph module of a program: flat, without guards and export's metadata. It returns tensors alone."""
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    gm.meta = {}
    output = gm.graph.output_node()
    tensors = tuple(x for x in pytree.tree_leaves(output.args[0]) if isinstance(x, Node))
    output.args = (tensors,)
    gm.graph.set_codegen(CodeGen())
    gm.recompile()
    return gm


@tracing()
def flat_graph(model: QuantizedGraph, *, table: Table | None = None) -> GraphModule:
    """Return the graph without submodules, in-place writes and checks, in torch's composite operators.

    Its nodes have fake values for a batch of any size. It returns tensors alone.

    table: operators to write by others (`decompose`).
    """
    gm = _flattened(model)
    if gm is None or (table and decompose(gm, table=table) is None):
        program = exported(model)
        if table or any(mutated_inputs(n) for n in program.graph.nodes):
            program = program.run_decompositions(dict(table or {}))  # this traces it once more
        gm = fresh(graph_of(program))
    for node in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)  # it checks dtypes; `DropIn` checks the inputs
    return gm


def _flattened(model: QuantizedGraph) -> GraphModule | None:
    """Return the graph with the nodes of its temporal block in it, and fake values.

    It is what torch.export would trace, in a tenth of the time. None where a trace may find other operators: in place of
    writes, modules, and operators that run graphs.
    """
    graph = Graph()
    output = graph.graph_copy(model.network.graph, {})
    graph.output(tuple(x for x in pytree.tree_leaves(output) if isinstance(x, Node)))
    for node in graph.find_nodes(op="call_module"):
        inner = model.network.get_submodule(node.target)
        if not isinstance(inner, GraphModule) or node.kwargs:
            return None
        taken = dict(zip(inner.graph.find_nodes(op="placeholder"), node.args, strict=True))
        with graph.inserting_before(node):
            result = paste(graph, inner.graph, taken, prefix=node.target)
        put_in_place(node, result)
    if graph.find_nodes(op="call_module") or any(map(mutated_inputs, graph.nodes)):
        return None
    if any(isinstance(n.target, HigherOrderOperator) for n in graph.nodes):
        return None
    graph.eliminate_dead_code()
    graph.lint()
    gm = GraphModule(model.network, graph)
    gm.meta = {}
    sizes = {name: {*dims} for name, dims in dynamic_shapes(model).items()}
    set_fake_values(gm, example_inputs(model, batch=2), dynamic=sizes, apart=model.interface.moves())
    return gm


def dynamic_shapes(model: QuantizedGraph) -> dict[str, dict[int, Any]]:
    """Return the dimensions of the graph's inputs that may have any size, in torch.export's format."""
    return {
        n: {i: torch.export.Dim.AUTO for i, s in enumerate(spec["shape"]) if s is None}
        for n, spec in model.interface.inputs.items()
    }


def save_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """Save a program through memory: on a full disk, torch.export.save's own writer ends the process."""
    data = io.BytesIO()
    torch.export.save(program, data)
    file.write_bytes(data.getbuffer())
