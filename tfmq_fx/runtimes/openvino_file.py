"""Write a quantized graph as an OpenVINO model.

    network.xml, network.bin    OpenVINO's own format; weights as int8, activations by FakeQuantize
    layers.json                 the convolutions, linears and matmuls, and how they should run

OpenVINO fuses FakeQuantize and the int8 constants into int8 kernels when it compiles. On a CPU with bfloat16
it computes everything else in that type, unless a layer is marked `precise` in the file. Timesteps up to 1000
and the sums that cancel a zero point do not fit in bfloat16's eight bits. So the layers that depend on the
timestep alone are marked, up to its last products, and those that `rescale_temporal` put in.
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
from torch.fx import GraphModule, Node

from tfmq_fx.artefact.program import flat_graph
from tfmq_fx.artefact.quantized_graph import QuantizedGraph
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_folder
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import aten, op_name, weight_argument
from tfmq_fx.passes.int8.bound_first_terms import bound_first_terms
from tfmq_fx.passes.int8.complex_as_real import is_complex
from tfmq_fx.passes.int8.decompose import Table
from tfmq_fx.passes.int8.einsum_as_matmul import einsum_as_matmul
from tfmq_fx.passes.int8.fold_weights import fold_weights
from tfmq_fx.passes.int8.integer_weights import integer_weights
from tfmq_fx.passes.int8.multiply_in_float import multiply_in_float
from tfmq_fx.passes.int8.norms_by_channel import norms_by_channel
from tfmq_fx.passes.int8.plain_sizes import plain_sizes
from tfmq_fx.passes.int8.rescale_temporal import PRECISE
from tfmq_fx.passes.int8.round_float8 import round_float8
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.int8.unsqueeze_linears import unsqueeze_linears
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.temporal.find_temporal import taint
from tfmq_fx.runtimes.layers import EngineLayer, layers_of, saturating_layers, saturating_products

MODEL, WEIGHTS, LAYERS = "network.xml", "network.bin", "layers.json"


# A folder may be used on any CPU. Layers that saturate on some CPUs are written in float if they are at most
# this share of the multiplications, as the few 8-bit layers of W4A8 are.
PORTABLE = 0.05


# OpenVINO writes kernels for chains of operators. What it cannot write one for, it can still compute one by one.
APART = {"SNIPPETS_MODE": "DISABLE"}
# OpenVINO's settings for float arithmetic on the same integers, for CPUs that sum byte products in 16 bits. With its
# generated kernels, 2026.4 then crashes on a group norm that is scaled before it is quantized.
FLOAT = {"LP_TRANSFORMS_MODE": "NO", **APART}


def require_openvino() -> Any:
    """Return the package. Raises a TFMQError that says how to install it if it is missing."""
    try:
        import openvino
    except ImportError as error:
        raise TFMQError(
            f'target "cpu": needs the package openvino ({error}); pip install "tfmq_fx[openvino]".'
        ) from error
    return openvino


def export_folder(model: QuantizedGraph, folder: Path) -> tuple[str, ...]:
    """Write OpenVINO's files, and return notes for users who compile them.

    Raises TFMQError when the folder holds anything else, and for a node that OpenVINO cannot express, naming
    it.
    """
    names = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    if not names <= {MODEL, WEIGHTS, LAYERS} or folder.is_file():
        raise TFMQError(f"{folder}: holds something else; choose another folder or remove it yourself.")
    found: list[str] = []
    if model.recipe.get("smooth") is not None:
        found.append(
            "compile it with a fixed batch (model.reshape): for a batch of any size, OpenVINO 2026.4 overwrites smoothed activations"
        )
    replace_folder(folder, lambda temporary: found.extend(write(model, temporary, float_share=PORTABLE)))
    return tuple(found)


def write(model: QuantizedGraph, folder: Path, *, float_share: float = 0.0) -> list[str]:
    """Write the model's files into an existing folder, and return notes as `export_folder` does.

    float_share: the layers whose int8 kernels saturate on CPUs without VNNI are left in float if they are at
        most this share of the multiplications; 1 means always. Their weights are then written in float,
        unless those of all layers would be: such a network must be compiled with `FLOAT`.

    Raises TFMQError naming a node that OpenVINO cannot express.
    """
    openvino = require_openvino()
    gm = flat_graph(model, table=_table())
    PassManager(TO_INT8)(gm)
    before = {layer.node: layer for layer in layers_of(gm)}
    # OpenVINO 2026.4 computes these when it compiles, and cannot quantize there.
    constant = [n for n in _constant_layers(gm) if not before[n.name].float_because]
    for node in constant:
        before[node.name] = dataclasses.replace(before[node.name], float_because="its input is a constant")
    if constant:
        multiply_in_float(gm, constant)
        fold_weights(gm, constant)
    quantized = {name: layer.flops for name, layer in before.items() if not layer.float_because}
    weighted = saturating_layers(gm)
    products = [n for n in saturating_products(gm) if n.name in quantized]
    saturating = {n.name for n in (*weighted, *products)}
    share = sum(quantized[name] for name in saturating) / max(sum(quantized.values()), 1)
    in_float = saturating if share <= float_share else set()
    if in_float and len(in_float) < len(quantized):
        fold_weights(gm, weighted)
        multiply_in_float(gm, products)
    PassManager(
        [norms_by_channel, bound_first_terms, unsqueeze_linears, round_float8, integer_weights, plain_sizes]
    )(gm)
    _require_real(gm)
    _separate_outputs(gm)
    ir = _convert(gm)
    _name_weights(ir)
    try:
        openvino.serialize(ir, folder / MODEL, folder / WEIGHTS)
    except RuntimeError as error:  # C++'s streams raise nothing more specific for a full disk
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


def _constant_layers(gm: GraphModule) -> list[Node]:
    """Return the layers whose input depends on sizes alone, such as the positions of frames."""
    marks = taint(gm)
    return [n for n in gm.graph.nodes if weight_argument(n) is not None and not marks[n]]


def _table() -> Table:
    """Return the decompositions of all operators but those that OpenVINO's converter expects whole."""
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose

    table = torch.export.default_decompositions()
    for op in (*ops_to_not_decompose(), aten.instance_norm.default):
        table.pop(op, None)
    return dict(table.items()) | {aten.einsum.default: einsum_as_matmul}


def _convert(gm: GraphModule) -> Any:
    """Convert the graph with OpenVINO's frontend.

    `openvino.convert_model` would do the same, but it reports to Google Analytics, from a fork of this
    process.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    class Decoder(TorchFXPythonDecoder):  # type: ignore[misc]
        """OpenVINO's decoder, which finds each input of a node in the list of all nodes."""

        def __init__(self, gm: GraphModule, **settings: Any) -> None:
            super().__init__(gm, **settings)
            self._nodes: list[Node] = _Indexed(gm.graph.nodes)

    frontend = FrontEndManager().load_by_framework("pytorch")
    # `dynamic_shapes` would make every size dynamic; the batch is dynamic already. The decoder has a name
    # because the frontend does not keep it alive.
    decoder = Decoder(gm, dynamic_shapes=False)
    try:
        return frontend.convert(frontend.load(decoder))
    except Exception as error:  # OpenVINO raises many types; its message names the operator or node
        raise TFMQError(_cannot_express(gm, str(error))) from error


class _Indexed(list[Node]):
    """A list of nodes that finds one without a search."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        super().__init__(nodes)
        self.places = {node: i for i, node in enumerate(self)}

    def index(self, node: Node, *_: Any) -> int:
        return self.places[node]


def _name_weights(ir: Any) -> None:
    """Name the bytes of a weight after the node that multiplies them by their scales.

    Layers lose their names when OpenVINO fuses them, but the constants that they read keep theirs.
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
        return f"node {nodes[0].name}: OpenVINO cannot express {nodes[0].target}; {NOT_LOWERED}"
    return f"OpenVINO cannot convert the graph: {words.strip().splitlines()[-1]}; {NOT_LOWERED}"


NOT_LOWERED = 'q.lower("cpu", engine="torch") runs it on int8 kernels here, and format "pt2" elsewhere.'


# What OpenVINO computes of complex numbers. Other operators it applies to their real and imaginary parts, one by one.
_OF_COMPLEX = ("view_as_complex", "view_as_real", "real", "imag", "abs", "fft_", "_fft_")


def _require_real(gm: GraphModule) -> None:
    """Raise TFMQError naming the first node whose result would be wrong, because it multiplies complex numbers."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or op_name(node).startswith(_OF_COMPLEX):
            continue
        if any(is_complex(n) for n in (node, *node.all_input_nodes)):
            raise TFMQError(
                f"node {node.name}: OpenVINO cannot express {node.target} of complex numbers; {NOT_LOWERED}"
            )


def _separate_outputs(gm: GraphModule) -> None:
    """Give each output a node of its own: OpenVINO's converter fails for one that is returned twice, or an input."""
    output, seen = gm.graph.output_node(), set[Node]()
    with gm.graph.inserting_before(output):
        for i, node in enumerate(found := list(output.args[0])):  # type: ignore[arg-type]
            if node in seen or node.op == "placeholder":
                found[i] = gm.graph.call_function(aten.add.Tensor, (node, 0))
                found[i].meta = dict(node.meta)
            seen.add(node)
    output.args = (tuple(found),)


_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")


def mark_precise(file: Path, *, inputs: Iterable[str], nodes: Iterable[str]) -> None:
    """Mark layers as `precise` in OpenVINO's XML: those that depend on `inputs` alone, and those that come from `nodes`.

    What only follows the last products of `inputs` is not marked: it is as coarse as they are, and its float32 would
    spread to the pictures that it scales. A shape says nothing about values: a layer that reads only the shape of an
    input does not depend on that input.
    """
    tree = ElementTree.parse(file)
    sources: dict[str, list[str]] = {}
    for edge in tree.iterfind("./edges/edge"):
        sources.setdefault(edge.attrib["to-layer"], []).append(edge.attrib["from-layer"])
    inputs, nodes = set(inputs), set(nodes)
    layers = {
        layer.attrib["id"]: layer for layer in tree.iterfind("./layers/layer")
    }  # in the order of the graph
    marks: dict[str, set[str]] = {}
    products: set[str] = set()  # and what follows them
    for key, layer in layers.items():
        above, kind = sources.get(key, []), layer.attrib["type"]
        reads = set().union(*(marks[source] for source in above)) if kind != "ShapeOf" else set()
        marks[key] = {layer.attrib["name"]} if kind == "Parameter" else reads
        if kind in _PRODUCTS or not products.isdisjoint(above):
            products.add(key)
    alone = {k for k in marks if marks[k] and marks[k] <= inputs and layers[k].attrib["type"] != "Parameter"}
    read: set[str] = set()  # products of `alone`, and what they read
    for key in reversed(layers):
        if key in alone and (key in read or layers[key].attrib["type"] in _PRODUCTS):
            read |= {key, *sources.get(key, [])}
    fine = {k for k in alone if k in read or k not in products}
    for key, layer in layers.items():
        if key in fine or layer.attrib["name"].partition("/")[0] in nodes:
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, info)
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(file)


def read_layers(folder: Path) -> list[EngineLayer]:
    return [EngineLayer(**layer) for layer in json.loads((folder / LAYERS).read_text())]
