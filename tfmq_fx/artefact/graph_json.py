"""Convert an fx graph to JSON and back. The JSON is data only: reading it cannot run code.

Operators are named by qualified overload ("aten.conv2d.default") and looked up in two namespaces; Python
functions come from a short list. The JSON holds no tensors: a get_attr node names one of the artefact's
tensors.
"""

from __future__ import annotations

import keyword
import math
import operator
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.nodes import attribute, set_buffer

_NAMESPACES = ("aten", "quantized_decomposed")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (
            operator,
            [
                "getitem",
                "add",
                "sub",
                "mul",
                "floordiv",
                "truediv",
                "mod",
                "neg",
                "pow",
                "eq",
                "ne",
                "lt",
                "le",
                "gt",
                "ge",
                "and_",
                "or_",
            ],
        ),
        (math, ["ceil", "floor", "trunc", "sqrt"]),
        (torch, ["sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sum", "sym_sqrt"]),
    )
    for name in names
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_CONSTANTS = {
    kind: {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, cls)}
    for kind, cls in _KINDS.items()
}


def graph_to_json(gm: GraphModule) -> dict[str, Any]:
    """Return the graph's nodes and, recursively, the graphs of its submodules.

    Raises TFMQError naming the node that JSON cannot hold.
    """
    nodes = []
    submodules = {}
    for node in gm.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "call_function":
            entry["target"] = _target_name(node)
        else:
            entry["target"] = str(node.target)
        if node.op == "call_module":
            submodule = gm.get_submodule(str(node.target))
            if not isinstance(submodule, GraphModule):
                raise TFMQError(
                    f"node {node.name}: calls a {type(submodule).__name__}, which has no graph to save."
                )
            submodules[str(node.target)] = graph_to_json(submodule)
        if node.op != "placeholder":
            entry["args"] = [_encode(a, node) for a in node.args]
            if node.kwargs:
                entry["kwargs"] = {k: _encode(v, node) for k, v in node.kwargs.items()}
        nodes.append(entry)
    return {"nodes": nodes, "submodules": submodules}


def graph_from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GraphModule:
    """Invert `graph_to_json`: build the graph from its JSON.

    tensors: get_attr target -> tensor. Raises TFMQError naming the node that `graph_to_json` cannot have
    written.
    """
    root, graph = nn.Module(), Graph()
    made: dict[str, Node] = {}
    for name, sub in data["submodules"].items():
        if not is_name(name):
            raise TFMQError(f"graph.json: {name!r} is not a valid submodule name.")
        root.add_module(name, graph_from_json(sub, tensors))
    for entry in data["nodes"]:
        name, op, target = str(entry["name"]), entry["op"], entry["target"]
        if not is_name(name) or name in made:
            raise TFMQError(f"graph.json: {name!r} is not a valid and unique node name.")
        args = tuple(_decode(a, made) for a in entry.get("args", []))
        kwargs = {k: _decode(v, made) for k, v in entry.get("kwargs", {}).items()}
        if wrong := [k for k in kwargs if not is_name(k)]:
            raise TFMQError(f"graph.json: node {name!r}: {wrong[0]!r} is not a valid argument name.")
        if op == "placeholder" and is_name(target):
            node = graph.placeholder(target)
        elif op == "get_attr":
            if target not in tensors:
                raise TFMQError(
                    f"graph.json: node {name!r} needs the tensor {target!r}, which the weights file lacks."
                )
            set_buffer(root, target, tensors[target])
            node = graph.create_node("get_attr", target)
        elif op == "call_module" and target in data["submodules"]:
            node = graph.create_node("call_module", target, args, kwargs)
        elif op == "call_function":
            node = graph.create_node("call_function", _target(target), args, kwargs)
        elif op == "output":
            node = graph.output(args[0])
        else:
            raise TFMQError(f"graph.json: node {name!r} has the unknown operation {op!r} on {target!r}.")
        node.name = name
        made[name] = node
    if len(graph.find_nodes(op="output")) != 1:
        raise TFMQError("graph.json: a graph has one output, and this one has none or several.")
    graph.lint()
    return GraphModule(root, graph)


def is_name(name: Any) -> bool:
    """Return True for a name that cannot inject code into the source that torch.fx generates and runs."""
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def is_tensor_name(name: Any) -> bool:
    """Return True for a dotted path of modules that cannot end the quotes around it.

    torch.fx writes the path's parts, which may be numbers, between quotes into Python source.
    """
    return (
        isinstance(name, str) and name.isprintable() and all(name.split(".")) and not set(name) & set("\"'\\")
    )


def quantized_weights(gm: GraphModule) -> dict[str, tuple[int, int]]:
    """Return (quant_min, quant_max) of every integer weight of a converted graph, by get_attr target."""
    return {str(q.target): limits for _, q, _, limits in _dequantized_weights(gm)}


def packed_tensors(gm: GraphModule) -> dict[str, tuple[int, int]]:
    """Return (quant_min, quant_max) of every tensor that is stored at its bit width, by get_attr target.

    These are the integer weights, and the zero points that lie in the range of their weights.
    """
    found = quantized_weights(gm)
    for module, _, zero_point, (low, high) in _dequantized_weights(gm):
        if isinstance(zero_point, Node) and zero_point.op == "get_attr":
            value = attribute(module, str(zero_point.target))
            # The zero points of another quantizer may have any type and value.
            if not value.is_floating_point() and low <= int(value.min()) and int(value.max()) <= high:
                found[str(zero_point.target)] = (low, high)
    return found


def _dequantized_weights(gm: GraphModule) -> Iterator[tuple[GraphModule, Node, Any, tuple[int, int]]]:
    """Yield the graph, integers, zero point and limits of each dequantize_per_channel of a constant."""
    target = torch.ops.quantized_decomposed.dequantize_per_channel.default
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=target):
                q, _, zero_point, _, low, high, *_ = node.args
                if q.op == "get_attr":
                    yield module, q, zero_point, (low, high)


def tensors_of(gm: GraphModule) -> dict[str, Tensor]:
    """Return every tensor that the graph and its subgraphs read, by get_attr target.

    The targets are the network's own state-dict names. Raises TFMQError if two different tensors share one.
    """
    found: dict[str, Tensor] = {}
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.find_nodes(op="get_attr"):
                value = attribute(module, str(node.target)).detach()
                if found.setdefault(str(node.target), value) is not value and not torch.equal(
                    found[str(node.target)], value
                ):
                    raise TFMQError(f"two different tensors are called {node.target}.")
    return found


def _target_name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    raise TFMQError(
        f"node {node.name}: {target} cannot be saved; only aten operators and shape arithmetic can."
    )


def _target(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = str(name).split(".")
    if len(parts) == 3 and parts[0] in _NAMESPACES:
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2], None)
        # A few operators read or write a file that the graph names.
        if isinstance(overload, torch._ops.OpOverload) and not _takes_a_file(overload):
            return overload
    raise TFMQError(f"graph.json: operator {name!r} is unknown to torch {torch.__version__} or not allowed.")


def _takes_a_file(overload: torch._ops.OpOverload) -> bool:
    return any(a.name == "filename" for a in overload._schema.arguments)


def _encode(value: Any, node: Node) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # `load` puts the tensors there, wherever the network was
    if isinstance(value, slice):
        return {"slice": [_encode(v, node) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, node) for v in value]}
    if isinstance(value, list):
        return [_encode(v, node) for v in value]
    if isinstance(value, Mapping) and any(type(k) is int for k in value):  # JSON's keys are strings
        return {"items": [[k, _encode(v, node)] for k, v in value.items()]}
    if isinstance(value, Mapping):
        return {"dict": {str(k): _encode(v, node) for k, v in value.items()}}
    for kind, cls in _KINDS.items():
        if isinstance(value, cls):
            return {kind: str(value)}
    raise TFMQError(
        f"node {node.name}: its argument {value!r} of type {type(value).__name__} cannot be saved."
    )


def _decode(value: Any, made: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise TFMQError(f"graph.json: {reprlib.repr(value)} is not a valid argument.")
    ((kind, content),) = value.items()
    if kind == "node" and content in made:
        return made[content]
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "device" and isinstance(content, str):
        return torch.device(content)
    if kind == "slice":
        return slice(*(_decode(v, made) for v in content))
    if kind == "tuple":
        return tuple(_decode(v, made) for v in content)
    if kind == "dict":
        return {k: _decode(v, made) for k, v in content.items()}
    if kind == "items":
        return {k: _decode(v, made) for k, v in content}
    if kind in _CONSTANTS and content in _CONSTANTS[kind]:
        return _CONSTANTS[kind][content]
    raise TFMQError(f"graph.json: {reprlib.repr(value)} is not a valid argument.")
