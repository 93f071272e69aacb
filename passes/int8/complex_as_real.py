"""Write complex numbers as their real and imaginary parts, for runtimes that have no complex ones."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from tfmq_fx.graph.nodes import MOVES, add_call, aten, attribute, fake_mode_of, op_name, set_buffer
from tfmq_fx.passes.pass_manager import rewrite_modules

Call = Callable[..., Any]  # adds a call of an operator to the graph
Parts = tuple[Any, Any]  # what stands for a complex value: its real and its imaginary part


def complex_as_real(gm: GraphModule) -> PassResult:
    """Compute with the real and the imaginary parts of complex numbers, as rotary embeddings have them.

        view_as_real(view_as_complex(x) * turn)  ==>  stack([a * c - b * d, a * d + b * c], -1)

    a, b are the halves of x's last dimension; c, d are the parts of `turn`, two buffers. Numbers that meet a complex
    operator that is not written here, such as an fft, stay complex, and so do inputs and outputs.

    Numerics: those of torch's complex kernels, but for the rounding of a sum of two products.
    """
    return rewrite_modules(gm, _rewrite)


def _rewrite(module: GraphModule) -> bool:
    modified = False
    for nodes in _joined(module):
        if all(_is_written(node) for node in nodes):
            _write(module, nodes)
            modified = True
    return modified


def _joined(module: GraphModule) -> list[list[Node]]:
    """Return the nodes that have or read complex numbers, those that are connected together, in the graph's order."""
    groups: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        sources = [n for n in node.all_input_nodes if is_complex(n)]
        if sources or is_complex(node):
            connected = {id(groups[n]): groups[n] for n in sources}.values()
            found = [*(n for group in connected for n in group), node]
            groups.update(dict.fromkeys(found, found))
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    return [sorted(g, key=order.__getitem__) for g in {id(g): g for g in groups.values()}.values()]


def is_complex(node: Node) -> bool:
    """Return True if a node's result, or a part of it, is complex."""
    value = node.meta.get("val")
    if value is None:  # of several results, the readers have the values
        return any(user.target is operator.getitem and is_complex(user) for user in node.users)
    return any(isinstance(x, Tensor) and x.is_complex() for x in pytree.tree_leaves(value))


def _is_written(node: Node) -> bool:
    if node.op != "call_function":
        return node.op == "get_attr"
    given = pytree.tree_leaves((node.args, node.kwargs))
    if any(isinstance(x, complex) for x in given):
        return False
    if node.target in _WRITTEN or node.target is _CHECK:
        return True
    name = "getitem" if node.target is operator.getitem else op_name(node)
    if not is_complex(node):
        return name in _OF_SHAPE
    moved = pytree.tree_leaves(node.args[: 2 if name in _SCATTERS else 1])
    pads = name in _PADS and any(isinstance(x, float) and x for x in given)
    return name in _BY_PART and not pads and all(is_complex(x) for x in moved if isinstance(x, Node))


def _write(module: GraphModule, nodes: list[Node]) -> None:
    call = partial(add_call, module.graph)
    parts: dict[Node, Parts] = {}
    mode = fake_mode_of(nodes) or nullcontext()
    for node in nodes:
        made: Any
        with module.graph.inserting_before(node):
            if node.op == "get_attr":
                made = _constants(module, node)
            elif node.target is _CHECK:
                continue
            else:
                with mode:  # for operators that read no tensor
                    made = _written(call, node, parts)
        if is_complex(node):
            parts[node] = made
        else:
            node.replace_all_uses_with(made)
    for node in reversed(nodes):
        module.graph.erase_node(node)


def _written(call: Call, node: Node, parts: dict[Node, Parts]) -> Any:
    """Return the parts of a node's value, or its value if that is real."""
    if node.target in _WRITTEN:
        given: list[Any] = list(node.args)
        return _WRITTEN[node.target](call, *(parts.get(x, x) for x in given), **node.kwargs)

    def of(part: int) -> Any:
        given = map_arg((node.args, node.kwargs), lambda n: parts[n][part] if n in parts else n)
        args, kwargs = pytree.tree_map_only(torch.dtype, lambda d: d.to_real(), given)
        return call(node.target, *args, **kwargs)

    return (of(0), of(1)) if is_complex(node) else of(0)


def _constants(module: GraphModule, node: Node) -> Parts:
    found = []
    for name, read in (("real", torch.real), ("imaginary", torch.imag)):
        target = f"{node.target}_{name}"
        set_buffer(module, target, read(attribute(module, str(node.target))).contiguous())
        constant = module.graph.get_attr(target)
        constant.meta["val"] = read(node.meta["val"]).contiguous()
        found.append(constant)
    return found[0], found[1]


# Operators that give each part of the result from that part of the input.
_PADS = {"pad_sequence", "constant_pad_nd"}  # with zeros
_SCATTERS = {"select_scatter", "slice_scatter"}
_BY_PART = MOVES | _PADS | _SCATTERS
_BY_PART |= {"to", "_to_copy", "neg", "sum", "mean", "index", "index_select", "repeat", "flip", "roll"}
_OF_SHAPE = {"sym_size", "sym_numel"}
_CHECK = aten._assert_tensor_metadata.default  # of the dtype


def _parts(call: Call, x: Any) -> Parts:
    if isinstance(x, tuple):
        return x
    return x, call(aten.zeros_like.default, x) if isinstance(x, Node) else 0.0


def _full(call: Call, size: Any, value: float, *, dtype: torch.dtype, **given: Any) -> Parts:
    a, b = (call(aten.full.default, size, x, dtype=dtype.to_real(), **given) for x in (value, 0.0))
    return a, b


def _sum(op: Any, call: Call, x: Any, y: Any, *, alpha: float = 1) -> Parts:
    (a, b), (c, d) = _parts(call, x), _parts(call, y)
    return call(op, a, c, alpha=alpha), call(op, b, d, alpha=alpha)


def _product(call: Call, x: Any, y: Any) -> Parts:
    mul = partial(call, aten.mul.Tensor)
    if not isinstance(x, tuple) or not isinstance(y, tuple):
        (a, b), factor = (x, y) if isinstance(x, tuple) else (y, x)
        return mul(a, factor), mul(b, factor)
    (a, b), (c, d) = x, y
    return call(aten.sub.Tensor, mul(a, c), mul(b, d)), call(aten.add.Tensor, mul(a, d), mul(b, c))


def _polar(call: Call, length: Any, angle: Any) -> Parts:
    turned = (call(op, angle) for op in (aten.cos.default, aten.sin.default))
    a, b = (call(aten.mul.Tensor, length, x) for x in turned)
    return a, b


def _length(call: Call, x: Parts) -> Any:
    squares = [call(aten.mul.Tensor, part, part) for part in x]
    return call(aten.sqrt.default, call(aten.add.Tensor, *squares))


_WRITTEN: dict[Any, Callable[..., Any]] = {
    aten.view_as_complex.default: lambda call, x: (
        call(aten.select.int, x, -1, 0),
        call(aten.select.int, x, -1, 1),
    ),
    aten.view_as_real.default: lambda call, x: call(aten.stack.default, list(x), -1),
    aten.full.default: _full,
    aten.complex.default: lambda _call, a, b: (a, b),
    aten.polar.default: _polar,
    aten.real.default: lambda _call, x: x[0],
    aten.imag.default: lambda _call, x: x[1],
    aten.abs.default: _length,
    aten.angle.default: lambda call, x: call(aten.atan2.default, x[1], x[0]),
    **dict.fromkeys(
        (aten.conj.default, aten._conj.default, aten.conj_physical.default),
        lambda call, x: (x[0], call(aten.neg.default, x[1])),
    ),
    aten.mul.Tensor: _product,
    aten.add.Tensor: partial(_sum, aten.add.Tensor),
    aten.sub.Tensor: partial(_sum, aten.sub.Tensor),
}
