"""Facts about an fx node that passes need: which inputs carry values, what is a view, what has a weight.

Everything here reads operator schemas and graph structure, never the name of a module or of a class.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

aten = torch.ops.aten


# Operator name without namespace and overload -> index of its weight argument.
_WEIGHT_ARGUMENT = {
    "linear": 1, "conv1d": 1, "conv2d": 1, "conv3d": 1, "convolution": 1,
    "conv_transpose1d": 1, "conv_transpose2d": 1, "conv_transpose3d": 1,
}  # fmt: skip
LAYER_OPS = tuple(_WEIGHT_ARGUMENT)  # what is quantized


_CONVOLUTION_ARGUMENTS = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "transpose": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "convolution": (
        "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
    ),
}  # fmt: skip


_CONVOLUTION_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


_MATMULS = {"scaled_dot_product_attention": (0, 1, 2), "matmul": (0, 1), "bmm": (0, 1), "baddbmm": (1, 2)}


_METADATA = {
    "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "size", "stride", "numel", "dim", "shape",
    "dtype", "device", "ndim", "layout", "is_floating_point", "is_complex", "is_contiguous",
    "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size", "_assert_scalar",
    "_assert_async",
}  # fmt: skip


_FIRST_VALUE_ONLY = {"to", "type_as", "expand_as", "view_as", "reshape_as", "_to_copy"}


# They move values and compute none: what comes out is what went in, elsewhere.
MOVES = {
    "getitem", "slice", "select", "unsqueeze", "squeeze", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "expand",
    "permute", "transpose", "t", "movedim", "chunk", "split", "split_with_sizes", "unbind", "contiguous", "clone", "detach",
    "alias", "cat", "stack",
}  # fmt: skip
_VIEWS = MOVES | {
    "expand_as", "view_as", "to", "type_as", "_to_copy", "dropout", "repeat", "repeat_interleave", "lift_fresh_copy",
    "identity", "float", "double", "half", "bfloat16", "long", "int", "type",
}  # fmt: skip


_POINTWISE = {
    "add", "sub", "mul", "div", "neg", "rsub", "silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "mish",
    "exp", "log", "pow", "sqrt", "rsqrt", "clamp", "hardtanh", "leaky_relu", "elu", "lerp", "addcmul", "truediv",
    "hardswish", "softmax",
}  # fmt: skip


_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.setitem,
}  # fmt: skip


def op_name(node: Node) -> str:
    """Return the bare operator name: `aten.linear.default` -> "linear", `x.view(..)` -> "view"; else "".

    In-place variants have the name of their functional twin; `mutated_inputs` tells them apart. A torch.nn
    module has the name of its function: nn.SiLU -> "silu".
    """
    if node.op == "call_method":
        return str(node.target).removesuffix("_")
    if node.op == "call_module":
        cls = type(called_module(node))
        return cls.__name__.lower() if cls.__module__.startswith("torch.nn.modules.") else ""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
    elif target is builtins.getattr:
        name = str(node.args[1])
    else:
        assert callable(target)
        name = target.__name__
    return name if name.startswith("_") else name.removesuffix("_")


def is_decomposed(node: Node) -> bool:
    """Return True for torch.ao's operators on integers: quantize_per_tensor, dequantize_per_channel, ..."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "quantized_decomposed"


def called_module(node: Node) -> nn.Module:
    """Return the module that a call_module node calls."""
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(str(node.target))


def meta_value(node: Node) -> Any:
    """Return a node's fake value, from torch.export ("val") or Dynamo ("example_value"), or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def meta_without_value(node: Node) -> dict[str, Any]:
    """Return a node's metadata but for its fake value: that of a node which computes something of another shape."""
    return {k: v for k, v in node.meta.items() if k not in ("val", "example_value", "tensor_meta")}


def dtype_of(node: Node) -> torch.dtype:
    """Return the dtype of a node's tensor, as its capture or an example left it; float32 if neither did."""
    value = meta_value(node)
    return value.dtype if isinstance(value, Tensor) else torch.float32


def on_device_of(node: Node, x: Tensor) -> Tensor:
    """Return x on the device of a node's tensor. A graph without fake values takes it as it is."""
    value = meta_value(node)
    return x.to(value.device) if isinstance(value, Tensor) else x


def out_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """Return the keyword arguments of a dequantization to this dtype. The operators' own default is float32."""
    return {} if dtype == torch.float32 else {"out_dtype": dtype}


def hinted_shape(node: Any) -> list[int]:
    """Return the sizes of a node's tensor at capture, where a batch that may vary was two; 1 for one that values decide."""
    value = meta_value(node)
    assert isinstance(value, Tensor), node
    return [d if isinstance(d, int) else 1 if d.node.hint is None else d.node.hint for d in value.shape]


def convolution_arguments(node: Node) -> dict[str, Any]:
    """Return a convolution's arguments by name, with defaults.

    stride, padding (unless it is a word) and dilation have a number for each spatial dimension.
    """
    name = op_name(node)
    names = _CONVOLUTION_ARGUMENTS["transpose" if "transpose" in name else name.rstrip("123d")]
    given: dict[str, Any] = {
        **_CONVOLUTION_DEFAULTS,
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    dims = int(name[-2]) if name.endswith("d") else len(given["stride"])
    for key in ("stride", "padding", "dilation"):
        value = given[key]
        if not isinstance(value, str):
            values = [value] if isinstance(value, int) else list(value)
            given[key] = values * (dims // len(values))
    return given


def groups_of(layer: Node) -> int:
    """Return a convolution's groups: each output channel sees C_in / groups input channels. A linear's: 1."""
    found: int = 1 if op_name(layer) == "linear" else convolution_arguments(layer)["groups"]
    return found


def fixed_size(size: int | torch.SymInt) -> int | None:
    """Return the size if capture fixed it, None if it may vary. (A specialised SymInt is still a SymInt.)"""
    if isinstance(size, int):
        return size
    fixed: int | None = size.node.maybe_as_int()
    return fixed


def count(sizes: Iterable[int | torch.SymInt]) -> Any:
    """Return the product of sizes as an expression, which equals another if capture proved the two the same."""
    return math.prod(d.node.expr if isinstance(d, torch.SymInt) else d for d in sizes)


def value_inputs(node: Node) -> list[Node]:
    """Return the inputs whose values (not merely shape, dtype or device) reach this node's output."""
    name = op_name(node)
    if name in _METADATA:
        return []
    inputs = node.all_input_nodes
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if name in _FIRST_VALUE_ONLY:
        return [first] if first is not None else inputs
    if name.endswith("_like") or name.startswith("new_"):
        return [n for n in inputs if n is not first]
    return inputs


def is_random(node: Node) -> bool:
    """Return True if the node draws random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    # Dropout and attention carry the tag too; in eval mode with p = 0 they draw nothing.
    return op_name(node) not in ("dropout", "scaled_dot_product_attention")


def mutated_inputs(node: Node) -> list[Node]:
    """Return the inputs that this node writes to in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [n for n in node.args[:1] if isinstance(n, Node)] if _writes_its_first_argument(node) else []
    if not node.target._schema.is_mutable:
        return []
    return [
        value
        for spec, value in _with_specs(node)
        if spec.alias_info is not None and spec.alias_info.is_write and isinstance(value, Node)
    ]


def _writes_its_first_argument(node: Node) -> bool:
    """Return True for Python functions, methods and modules that write in place.

    For example `x.add_(y)`, `x += y`, `x[i] = y`, `relu(x, inplace=True)`.
    """
    if node.op == "call_module":
        return bool(getattr(called_module(node), "inplace", False))  # torch.nn's own switch
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.startswith("_"))
    if node.op != "call_function":
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    functional = name.endswith("_") and not name.startswith("_")
    return functional or node.target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True


def viewed_inputs(node: Node) -> list[Node]:
    """Return the inputs whose memory this node's output may share."""
    if not isinstance(node.target, torch._ops.OpOverload):
        name = op_name(node)
        shares = (name in _VIEWS and name not in ("clone", "cat", "stack")) or _writes_its_first_argument(
            node
        )
        return [n for n in node.args[:1] if isinstance(n, Node)] if shares else []
    return [v for spec, v in _with_specs(node) if spec.alias_info is not None and isinstance(v, Node)]


def schema_arguments(node: Node) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a call of torch's operators with the names that their schema gives them."""
    if isinstance(node.target, torch._ops.OpOverload):
        yield from ((spec.name, value) for spec, value in _with_specs(node))


def _with_specs(node: Node) -> Iterator[tuple[Any, Any]]:
    assert isinstance(node.target, torch._ops.OpOverload)
    for spec, value in zip(node.target._schema.arguments, node.args, strict=False):
        yield spec, value
    for spec in node.target._schema.arguments:
        if spec.name in node.kwargs:
            yield spec, node.kwargs[spec.name]


def is_view_or_pointwise(node: Node) -> bool:
    name = op_name(node)
    return name in _VIEWS or name in _POINTWISE


def is_by_row(node: Node) -> bool:
    """Return True for a layer that treats all dimensions of its input but the last alike."""
    name = op_name(node)
    return name == "linear" or (name in ("layer_norm", "rms_norm") and len(node.args[1]) == 1)  # type: ignore[arg-type]


def weight_argument(node: Node) -> int | None:
    """Return the index of the weight argument if this is a convolution or linear, else None."""
    return _WEIGHT_ARGUMENT.get(op_name(node)) if node.op == "call_function" else None


def weight_path(node: Node) -> str | None:
    """Return the path of a layer's weight; None if the weight is not a parameter, or the node is not a layer."""
    index = weight_argument(node)
    weight = node.args[index] if index is not None and index < len(node.args) else None
    by_name = any(isinstance(v, Node) for v in node.kwargs.values())
    is_parameter = isinstance(weight, Node) and weight.op == "get_attr" and not by_name
    return str(weight.target) if is_parameter else None  # type: ignore[union-attr]


def node_named(gm: GraphModule, name: str) -> Node:
    """Return the node with this name. Raises StopIteration if there is none."""
    node: Node = next(n for n in gm.graph.nodes if n.name == name)
    return node


_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def squeezed_dims(node: Node) -> list[int] | None:
    """Return the dimensions, counted from the first, that a squeeze takes where they are one.

    None for anything else, for a squeeze in place, and without shape metadata.
    """
    x = meta_value(node.args[0]) if node.target in _SQUEEZES else None  # type: ignore[arg-type]
    if not isinstance(x, Tensor):
        return None
    given = dict(schema_arguments(node)).get("dim", range(x.dim()))
    return [d % x.dim() for d in ([given] if isinstance(given, int) else given)] if x.dim() else []


def output_channel_axis(node: Node) -> int:
    """Return the weight's dimension of output channels: 1 for transposed convolutions, else 0."""
    return 1 if "transpose" in op_name(node) or (op_name(node) == "convolution" and node.args[6]) else 0


def matmul_inputs(node: Node) -> list[Node]:
    """Return the operands of a matmul or attention if all of them are computed tensors; else []."""
    indices = _MATMULS.get(op_name(node), ())
    operands = [node.args[i] for i in indices if i < len(node.args)]
    computed = [n for n in operands if isinstance(n, Node) and n.op != "get_attr"]
    return computed if len(computed) == len(indices) and indices else []


def attribute(gm: nn.Module, target: str) -> Any:
    """Return the value of a get_attr node with this target."""
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def plain_strides(x: Tensor) -> Tensor:
    """Return x in the layout that a file gives it back in.

    `contiguous()` leaves the stride of a dimension of size one, by which torch tells channels-last weights, whose kernels
    round differently.
    """
    plain = x.stride() == torch.empty(x.shape, device="meta").stride()
    return x if plain else x.clone(memory_format=torch.contiguous_format)


def set_buffer(gm: nn.Module, target: str, value: Tensor) -> None:
    """Register `value` as a buffer at a dotted path, in place of a tensor there.

    Plain modules are created where the path has none.
    """
    module, name = _owner(gm, target)
    if name in module._buffers:
        module._buffers[name] = value
    else:
        module._parameters.pop(name, None)
        module.register_buffer(name, value)


def set_parameter(gm: nn.Module, target: str, value: Tensor) -> None:
    """Register `value` as a parameter at a dotted path, in place of a tensor there, as `set_buffer` does."""
    module, name = _owner(gm, target)
    if hasattr(module, name):
        delattr(module, name)
    # torch multiplies in another order by a matrix that requires a gradient, even where none is computed.
    module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=value.requires_grad))


def _owner(gm: nn.Module, target: str) -> tuple[nn.Module, str]:
    """Return the module and the name of a tensor at a dotted path, creating plain modules where the path has none."""
    *path, name = target.split(".")
    module = gm
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module, name


def inline(graph: Graph, function: Callable[..., Any], *arguments: Node) -> Node:
    """Trace `function` on these nodes at the graph's insertion point, and return the node of its result."""
    tracer = GraphAppendingTracer(graph)
    node: Node = function(*(Proxy(n, tracer) for n in arguments)).node
    return node


def paste(graph: Graph, inner: Graph, taken: dict[Node, Any], *, prefix: str) -> Any:
    """Copy the nodes of another graph to the graph's insertion point, and return what stands for its output.

    taken: what stands for its placeholders; the copies of all its nodes join it. prefix: the path of its module, where
    its constants lie.
    """
    result = graph.graph_copy(inner, taken)
    for constant in inner.find_nodes(op="get_attr"):
        taken[constant].target = f"{prefix}.{constant.target}"
    return result


def add_call(graph: Graph, target: Callable[..., Any], *arguments: Any, **named: Any) -> Node:
    """Add a call of an operator, with the fake value that it makes of its arguments' values."""
    node = graph.call_function(target, arguments, named)
    args, kwargs = map_arg((node.args, node.kwargs), meta_value)
    node.meta["val"] = target(*args, **kwargs)
    return node


def put_in_place(node: Node, result: Any) -> None:
    """Let the users of a node read the result, a node or nested nodes, instead, and erase it."""
    for user in list(node.users):
        if user.target is operator.getitem and not isinstance(result, Node):
            put_in_place(user, result[user.args[1]])
        else:
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda x: result if x is node else x)
    node.graph.erase_node(node)


def ancestors(nodes: Iterable[Node], also: Mapping[Node, Iterable[Node]] | None = None) -> set[Node]:
    """Return `nodes` and everything they are computed from.

    also: further sources of a node, such as writes in place to the memory that it reads.
    """
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
            stack.extend((also or {}).get(node, ()))
    return seen


def edge_layers(gm: GraphModule, *, timestep: str) -> set[Node]:
    """Return the first and last weighted layers.

    First: the only one that an input reaches first. Last: the one or two that reach the output last. An input
    that fans out to many layers at once (a text embedding read by every cross-attention) has no first layer
    in this sense. The timestep has as many as it reaches before another layer's output joins: some networks embed it
    anew in each block, others add it to a stream that every layer reads.
    """
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    output = next(n for n in gm.graph.nodes if n.op == "output")
    found: set[Node] = set()
    for node in inputs:
        layers = _first_weighted([node], forward=True)
        if node.target == timestep:
            found |= layers - _after_layers(gm)
        elif len(layers) == 1:
            found |= layers
    layers = _first_weighted([output], forward=False)
    return found | layers if len(layers) <= 2 else found


def _after_layers(gm: GraphModule) -> set[Node]:
    """Return what is computed from the output of a weighted layer."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if any(x in found or weight_argument(x) is not None for x in value_inputs(node)):
            found.add(node)
    return found


_DECISIONS = ("topk", "argmax", "argmin")


def deciding_layers(gm: GraphModule) -> set[Node]:
    """Return the weighted layers that decide which of several things is taken, such as a token's experts: a rounded one takes others.

    Nothing but views and pointwise functions lies between them and the choice.
    """
    found: set[Node] = set()
    stack = [n for n in gm.graph.nodes if op_name(n) in _DECISIONS and _takes_places(n)]
    seen = set(stack)
    while stack:
        for x in value_inputs(stack.pop()):
            if weight_argument(x) is not None:
                found.add(x)
            elif x not in seen and is_view_or_pointwise(x):
                seen.add(x)
                stack.append(x)
    return found


def _takes_places(node: Node) -> bool:
    """Return True if anything reads the places of what is chosen, and not its values alone."""
    return op_name(node) != "topk" or any(u.args[1:] == (1,) and u.users for u in node.users)


def _first_weighted(start: Iterable[Node], *, forward: bool) -> set[Node]:
    found: set[Node] = set()
    seen: set[Node] = set(start)
    stack = list(seen)
    while stack:
        node = stack.pop()
        following = [u for u in node.users if node in value_inputs(u)] if forward else value_inputs(node)
        for other in following:
            if other in seen:
                continue
            seen.add(other)
            if weight_argument(other) is not None:
                found.add(other)
            else:
                stack.append(other)
    return found


def fake_mode_of(nodes: Iterable[Node]) -> FakeTensorMode | None:
    """Return the mode that the nodes' fake values (`meta_value`) were made in, whatever mode is active here; None if they have none."""
    leaves = pytree.tree_leaves([meta_value(n) for n in nodes])
    return next((x.fake_mode for x in leaves if isinstance(x, FakeTensor)), None)


def fresh(gm: GraphModule) -> GraphModule:
    """Return a linted, recompiled GraphModule on a copy of the graph, sharing parameters and submodules."""
    graph = torch.fx.Graph(tracer_cls=gm.graph._tracer_cls)
    output = graph.graph_copy(gm.graph, {})
    original = gm.graph.output_node()
    node = graph.output(output, original.type)
    node.meta = dict(original.meta)
    graph.lint()
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy
