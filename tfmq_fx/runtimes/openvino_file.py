"""A quantized graph as an OpenVINO model: written, compiled, and what its kernels turned out to be.

    network.xml, network.bin    OpenVINO's own format; weights as int8, activations by FakeQuantize
    layers.json                 the convolutions, linears and matmuls, with what they should run as

OpenVINO fuses FakeQuantize and the int8 constants into int8 kernels when it compiles. On a CPU with bfloat16 it
computes everything else in that type, unless a layer is marked `precise` in the file. Timesteps up to 1000 and the
sums that cancel a zero point do not fit bfloat16's eight bits: what follows from the timestep alone is marked, and
what `rescale_temporal` put in.
"""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from tfmq_fx.artefact.drop_in import QuantizedGraph
from tfmq_fx.artefact.program import exported, graph_of
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_folder
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.passes.int8.fold_weights import fold_weights
from tfmq_fx.passes.int8.integer_weights import integer_weights
from tfmq_fx.passes.int8.multiply_in_float import multiply_in_float
from tfmq_fx.passes.int8.rescale_temporal import PRECISE
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.runtimes.layers import EngineLayer, layers_of, saturating_layers, saturating_products

MODEL, WEIGHTS, LAYERS = "network.xml", "network.bin", "layers.json"


# A folder may be carried to any CPU: layers that saturate on some are in float in it where they are at most this share of the
# multiplications, as the few of 8 bits are at W4A8.
PORTABLE = 0.05


# OpenVINO's setting for float arithmetic on the same integers, where byte products would be summed in 16 bits.
FLOAT = {"LP_TRANSFORMS_MODE": "NO"}


def require_openvino() -> Any:
    """The package, or a TFMQError that says how to get it."""
    try:
        import openvino
    except ImportError as error:
        raise TFMQError(
            f'target "cpu": needs the package openvino ({error}); pip install "tfmq_fx[openvino]".'
        ) from error
    return openvino


def export_folder(model: QuantizedGraph, folder: Path) -> tuple[str, ...]:
    """Write OpenVINO's files; what somebody who compiles them should know. Raises TFMQError when the folder holds anything else."""
    names = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    if not names <= {MODEL, WEIGHTS, LAYERS} or folder.is_file():
        raise TFMQError(f"{folder}: holds something else; choose another folder or remove it yourself.")
    found: list[str] = []
    if model.recipe.get("smooth") is not None:
        found.append(
            "compile it with a fixed batch (model.reshape): for one of any size OpenVINO 2026.4 overwrites smoothed activations"
        )
    replace_folder(folder, lambda temporary: found.extend(write(model, temporary, float_share=PORTABLE)))
    return tuple(found)


def write(model: QuantizedGraph, folder: Path, *, float_share: float = 0.0) -> list[str]:
    """Write the model's files into a folder that is there; as `export_folder`. Raises TFMQError naming a node OpenVINO lacks.

    float_share: the layers whose int8 kernels saturate on CPUs without VNNI are left in float where they are at most this
        share of the multiplications, 1 being always. Their weights are written so, unless all would be: such a network
        is compiled with `FLOAT`.
    """
    openvino = require_openvino()
    gm = graph_of(decomposed(model))
    PassManager(TO_INT8)(gm)
    before = {layer.node: layer for layer in layers_of(gm)}
    quantized = {name: layer.flops for name, layer in before.items() if not layer.float_because}
    weighted = saturating_layers(gm)
    products = [n for n in saturating_products(gm) if n.name in quantized]
    saturating = {n.name for n in (*weighted, *products)}
    share = sum(quantized[name] for name in saturating) / max(sum(quantized.values()), 1)
    in_float = saturating if share <= float_share else set()
    if in_float and len(in_float) < len(quantized):
        fold_weights(gm, weighted)
        multiply_in_float(gm, products)
    PassManager([integer_weights])(gm)
    ir = _convert(gm)
    _name_weights(ir)
    try:
        openvino.serialize(ir, folder / MODEL, folder / WEIGHTS)
    except RuntimeError as error:  # all that C++'s streams say of a disk that is full
        raise OSError(f"OpenVINO: {error}") from error
    block = placeholders(model.temporal_block)
    marked = [n.name for n in gm.graph.nodes if n.meta.get(PRECISE)]
    mark_precise(folder / MODEL, inputs=block, nodes=marked)
    layers = [
        dataclasses.asdict(
            dataclasses.replace(before[now.node], weight=now.weight, saturates=now.node in in_float)
        )
        for now in layers_of(gm)
    ]
    (folder / LAYERS).write_text(json.dumps(layers, indent=1) + "\n")
    if not saturating:
        return []
    words = f"{len(saturating)} of {len(quantized)} quantized layers saturate on a CPU without VNNI or AMX"
    if in_float:
        return [f"{words}: they are in float ({share:.2g} of the multiplications)"]
    return [f"{words}, unless OpenVINO compiles them there with {FLOAT}"]


def decomposed(model: QuantizedGraph) -> torch.export.ExportedProgram:
    """The flat graph, in the operators that OpenVINO's converter wants to see."""
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    table = torch.export.default_decompositions()
    for op in ops_to_not_decompose():
        table.pop(op, None)
    program: torch.export.ExportedProgram = exported(model).run_decompositions(table)
    return program


def _convert(gm: GraphModule) -> Any:
    """By OpenVINO's frontend itself: its `convert_model` would tell Google Analytics of it, from a fork of this process."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    # "dynamic_shapes" would make every size dynamic; the batch is so already. The frontend does not keep the decoder alive.
    decoder = TorchFXPythonDecoder(gm, dynamic_shapes=False)
    try:
        return frontend.convert(frontend.load(decoder))
    except Exception as error:  # OpenVINO's own types differ by what failed; its words name operator or node
        raise TFMQError(_cannot_express(gm, str(error))) from error


def _name_weights(ir: Any) -> None:
    """Call the bytes of a weight like the node that multiplies them by their scales.

    Layers lose their names where OpenVINO fuses them; the constants that they read keep theirs.
    """
    for product in ir.get_ops():
        if product.get_type_name() == "Multiply":
            value = product.input_value(0).get_node()
            if value.get_type_name() == "Subtract":
                value = value.input_value(0).get_node()
            if (
                value.get_type_name() == "Convert"
                and value.input_value(0).get_node().get_type_name() == "Constant"
            ):
                name = product.get_friendly_name().partition("/")[0]
                value.input_value(0).get_node().set_friendly_name(f"{name}/integers")


def _cannot_express(gm: GraphModule, words: str) -> str:
    missing = re.findall(r"No conversion rule found for operations: (.*)", words)
    operators = {op.strip() for line in missing for op in line.split(",")}
    failed = re.findall(r"during conversion of operation ([^/\s]+)/", words)
    nodes = [n for n in gm.graph.nodes if str(n.target) in operators or n.name in failed]
    if nodes:
        return f"node {nodes[0].name}: OpenVINO has no form of {nodes[0].target}; {_NOT_LOWERED}"
    return f"OpenVINO cannot convert the graph: {words.strip().splitlines()[-1]}; {_NOT_LOWERED}"


_NOT_LOWERED = "use the quantized network as it is, or export it as .pt2."


def mark_precise(file: Path, *, inputs: Iterable[str], nodes: Iterable[str]) -> None:
    """Mark as `precise` in OpenVINO's XML what depends on the given inputs alone, and what was made of `nodes`.

    A shape says nothing of values: what is read from the shape of another input is not its dependent.
    """
    tree = ElementTree.parse(file)
    sources: dict[str, list[str]] = {}
    for edge in tree.iterfind("./edges/edge"):
        sources.setdefault(edge.attrib["to-layer"], []).append(edge.attrib["from-layer"])
    inputs, nodes = set(inputs), set(nodes)
    marks: dict[str, set[str]] = {}
    for layer in tree.iterfind("./layers/layer"):  # in the order of the graph
        key, name, kind = (layer.attrib[a] for a in ("id", "name", "type"))
        above = [marks[source] for source in sources.get(key, [])]
        marks[key] = {name} if kind == "Parameter" else set().union(*above) if kind != "ShapeOf" else set()
        alone = bool(marks[key]) and marks[key] <= inputs and kind != "Parameter"
        if alone or name.partition("/")[0] in nodes:
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, info)
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(file)


def read_layers(folder: Path) -> list[EngineLayer]:
    return [EngineLayer(**layer) for layer in json.loads((folder / LAYERS).read_text())]
