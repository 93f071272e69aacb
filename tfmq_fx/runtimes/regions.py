"""Compile what lies between a graph's kernels, each kind of region once.

A network repeats its blocks, and so the operations between two products: a norm and a quantization, or a gated activation and a
quantization. Inductor, given the whole, writes and compiles every one of them, for minutes; and what it fuses ends at the
kernels anyway.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, map_arg
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions
from torch.utils import _pytree as pytree

from tfmq_fx.graph.nodes import aten, put_in_place, set_buffer
from tfmq_fx.passes.int8.kernels import FLOAT8_KERNEL, GPU_KERNELS, arguments_of, set_arguments
from tfmq_fx.passes.int8.share_quantized import QUANTIZE

log = logging.getLogger(__name__)
Compile = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Any]]

KERNELS = (*GPU_KERNELS, FLOAT8_KERNEL, aten.scaled_dot_product_attention.default)
FORM = "form"  # in a node's meta, while it is compiled: the form of its value
ALIGNMENT = 16  # bytes


class Form(NamedTuple):
    """What compiled code depends on of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool

    @staticmethod
    def of(x: Tensor) -> Form:
        aligned = bool(x.storage_offset() * x.itemsize % ALIGNMENT == 0)
        return Form(tuple(x.shape), x.stride(), x.dtype, x.device, aligned)

    def example(self) -> Tensor:
        """Return zeros of this form: what an index reads must exist."""
        size = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        start = 0 if self.aligned else 1
        flat = torch.zeros(max(size, 1) + start, dtype=self.dtype, device=self.device)
        return flat.as_strided(self.shape, self.strides, start)


def compile_regions(gm: GraphModule, inputs: Sequence[Tensor], compile: Compile) -> GraphModule:
    """Return the graph for inputs of these shapes, in which each region between kernels is one compiled function.

    It runs once, as it is, on the inputs. compile: returns a function that computes a graph, which returns a tuple, for tensors
    of the forms of the given ones. Regions of equal operations on equal forms share it.

    Numerics: those of the compiler.
    """
    _constants_as_tensors(gm, inputs[0].device)
    _lay_out_pictures(gm)
    run = _Recorded(gm)
    with torch.no_grad():
        run.run(*inputs)
    for node, number in reversed(run.numbers.items()):  # sizes, which are known now
        put_in_place(node, number)
    regions = list(_regions(gm, run.views))
    fuse_by_partitions(gm, [dict.fromkeys(r) for r in regions], prefix="region_", always_return_tuple=True)
    known: dict[Any, nn.Module] = {}
    for i in range(len(regions)):
        part = gm.get_submodule(f"region_{i}")
        assert isinstance(part, GraphModule)
        key = _key(part)
        if key not in known:
            examples = [n.meta[FORM].example() for n in part.graph.find_nodes(op="placeholder")]
            known[key] = _Compiled(compile(part, examples))
        gm.set_submodule(f"region_{i}", known[key])
    for node in gm.graph.nodes:
        node.meta.pop(FORM, None)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    log.info("lower: %d regions between kernels, %d of them compiled", len(regions), len(known))
    return gm


class _Compiled(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def _constants_as_tensors(gm: GraphModule, device: torch.device) -> None:
    """Let quantizations read their scales and zero points from memory: then they are equal from block to block."""
    call = gm.graph.call_function
    for i, node in enumerate(gm.graph.find_nodes(op="call_function", target=QUANTIZE)):
        x, scale, zero_point, low, high, dtype = node.args
        with gm.graph.inserting_before(node):
            y = call(aten._to_copy.default, (x,), {"dtype": torch.float32})
            if scale != 1.0:
                y = call(aten.mul.Tensor, (y, _scalar(gm, f"quantize_{i}_inverse", 1.0 / scale, device)))
            y = call(aten.add.Tensor, (call(aten.round.default, (y,)), _scalar(gm, f"quantize_{i}_zero", zero_point, device)))  # fmt: skip
            y = call(aten._to_copy.default, (call(aten.clamp.default, (y, low, high)),), {"dtype": dtype})
        node.replace_all_uses_with(y)
        gm.graph.erase_node(node)


def _scalar(gm: GraphModule, name: str, value: float, device: torch.device) -> Node:
    set_buffer(gm, name, torch.tensor(float(value), device=device))
    return gm.graph.get_attr(name)


def _lay_out_pictures(gm: GraphModule) -> None:
    """Let what is before a convolution's kernel pad and lay out its bytes as the kernel reads them."""
    made: dict[Any, Node] = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.tfmq.int8_conv2d.default):
        given = arguments_of(node)
        x, (height, width), value = given["x"], given["padding"], given["x_zero_point"]
        pads = [width, width, height, height] if value and (height or width) else []
        key = (x, *pads, value if pads else 0)
        if key not in made:
            with gm.graph.inserting_after(x):
                y = gm.graph.call_function(aten.constant_pad_nd.default, (x, pads, value)) if pads else x
            with gm.graph.inserting_after(y):
                last: dict[str, Any] = {"memory_format": torch.channels_last}
                made[key] = gm.graph.call_function(aten.contiguous.default, (y,), last)
        set_arguments(node, x=made[key], **({"padding": [0, 0], "x_zero_point": 0} if pads else {}))


class _Recorded(Interpreter):
    """An interpreter that keeps the form of each tensor in its node's meta, which nodes are views, and all plain numbers."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.views: set[Node] = set()
        self.numbers: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
        if not tensors and n.op == "call_function":
            self.numbers[n] = value
        if isinstance(value, Tensor):
            n.meta[FORM] = Form.of(value)
        if n.op == "call_function" and tensors:
            above = {
                _memory(x)
                for i in n.all_input_nodes
                for x in pytree.tree_leaves(self.env[i])
                if isinstance(x, Tensor)
            }
            if above.issuperset(map(_memory, tensors)):
                self.views.add(n)
        return value


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _regions(gm: GraphModule, views: set[Node]) -> Iterator[list[Node]]:
    """Yield sets of nodes that can be one function each: connected, and no path between them leads through a kernel.

    Nodes are on one level if equally many kernels lie before them, on the longest path. Views at the ends stay outside: they
    cost nothing, and their numbers differ from block to block.
    """
    level: dict[Node, int] = {}
    for node in gm.graph.nodes:
        level[node] = max((level[i] + (i.target in KERNELS) for i in node.all_input_nodes), default=0)

    def glue(n: Node) -> bool:
        return n.op == "call_function" and n.target not in KERNELS

    def together(a: Node, b: Node) -> bool:
        return glue(a) and glue(b) and level[a] == level[b]

    outside: set[Node] = set()
    for n in gm.graph.nodes:
        if n in views and all(i in outside for i in n.all_input_nodes if together(i, n)):
            outside.add(n)
    for n in reversed(gm.graph.nodes):
        if n in views and all(u in outside for u in n.users if together(u, n)):
            outside.add(n)
    for n in gm.graph.nodes:
        if n.target is getitem and n in outside and together(n.args[0], n) and n.args[0] not in outside:
            outside.discard(n)  # a region returns tensors, not tuples
    joined = _Joined()
    for n in gm.graph.nodes:
        if not glue(n) or n in outside:
            continue
        for i in n.all_input_nodes:
            if i.target in KERNELS:
                joined.join((i, level[n]), n)  # with what else reads its output
            elif together(i, n) and i not in outside:
                joined.join(i, n)
    found: dict[Any, list[Node]] = defaultdict(list)
    for n in gm.graph.nodes:
        if glue(n) and n not in outside:
            found[joined.root(n)].append(n)
    yield from (r for r in found.values() if sum(n not in views for n in r) > 1)


class _Joined:
    """Sets of things that were joined (union-find)."""

    def __init__(self) -> None:
        self.above: dict[Any, Any] = {}

    def root(self, x: Any) -> Any:
        while (above := self.above.setdefault(x, x)) is not x:
            self.above[x] = x = self.above[above]
        return x

    def join(self, a: Any, b: Any) -> None:
        self.above[self.root(a)] = self.root(b)


def _key(part: GraphModule) -> Any:
    """Return what two regions have in common that one function can compute."""
    numbers = {n: f"%{i}" for i, n in enumerate(part.graph.nodes)}
    return tuple(
        (
            n.op,
            n.meta[FORM] if n.op == "placeholder" else str(n.target),
            str(map_arg((n.args, n.kwargs), numbers.__getitem__)),
        )
        for n in part.graph.nodes
    )
