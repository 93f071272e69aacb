"""Export the quantized graph as a torch.export program."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.drop_in import QuantizedGraph, example_inputs
from tfmq_fx.base.tracing import tracing


@tracing()
def exported(model: QuantizedGraph) -> torch.export.ExportedProgram:
    """Return the quantized graph as a flat, functional program with named inputs and any batch size."""
    inputs, dynamic = example_inputs(model, batch=2), dynamic_shapes(model)
    with torch.no_grad():
        return torch.export.export(model.network, (), inputs, dynamic_shapes=dynamic, strict=False)


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
