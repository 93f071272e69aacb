"""Compute in bfloat16 between the int8 kernels."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.float8 import DTYPE
from tfmq_fx.graph.float8 import dequantized, is_cast, quantized_from, scale_nodes
from tfmq_fx.graph.nodes import aten, attribute, is_decomposed, op_name, set_buffer, value_inputs
from tfmq_fx.passes.int8.kernels import FLOAT8_KERNEL, KERNELS, output_dtype, set_arguments, set_output
from tfmq_fx.passes.int8.onednn_kernels import LAY_OUT
from tfmq_fx.passes.int8.rescale_temporal import PRECISE
from tfmq_fx.passes.int8.share_quantized import QUANTIZE
from tfmq_fx.passes.pass_manager import declare

_ARITHMETIC = ("add", "sub", "mul", "div", "clamp")


@declare(
    after=(
        "onednn_kernels",
        "cuda_kernels",
        "float8_kernels",
        "fuse_epilogues",
        "share_quantized",
        "merge_linears",
    )
)
def bfloat16_glue(
    gm: GraphModule, *, dtypes: dict[Node, torch.dtype], precise: Collection[str]
) -> PassResult:
    """Give float32 nodes bfloat16 inputs, with one cast where the two types meet; kernels write bfloat16.

        y = kernel(x, ..., float32); z = group_norm(y, w, b)
            ==>  y = kernel(x, ..., bfloat16); z = group_norm(y, to(w, bfloat16), to(b, bfloat16))

    dtypes: the dtype of every node that is a tensor, as found in a run of the graph.
    precise: names of inputs. Nodes that depend on these and constants alone keep float32.

    Nodes marked PRECISE and arithmetic that only feeds a quantization keep float32 too. Eight bits are not
    enough for timesteps up to 1000, for the scales looked up by them, and for sums that cancel.

    Numerics: each node rounds to 8 bits, in total about 1% of the largest output. Inputs and outputs keep
    their dtypes.
    """
    kept = _kept(gm, precise) | {n for n in gm.graph.nodes if _makes_float32(n) or _of_a_float_layer(n)}
    kept |= _of_float8(gm)
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    lowered: set[Node] = set()  # nodes whose dtype was float32 and is now bfloat16
    for node in list(gm.graph.nodes):
        if node.op in ("placeholder", "get_attr") or node.target is QUANTIZE or node.target in LAY_OUT:
            continue  # a quantization reads either type; a weight's scales are float32
        if node.target in KERNELS:
            if node not in kept and output_dtype(node) is torch.float32:
                set_output(node, dtype=torch.bfloat16)
                lowered.add(node)
            continue
        if node.target is FLOAT8_KERNEL:
            if node not in kept:
                bias = node.args[4]
                bias = _cast(gm, bias, torch.bfloat16) if isinstance(bias, Node) else None
                set_arguments(node, bias=bias, dtype=torch.bfloat16)
                lowered.add(node)
            continue
        keeps = node in kept or node.op == "output"
        wanted = torch.float32 if keeps else torch.bfloat16
        _give(gm, node, wanted, dtypes=dtypes, lowered=lowered, casts=casts)
        if not keeps and (dtypes.get(node) is torch.float32 or _holds_float32(node, dtypes)):
            lowered.add(node)
            node.args = tuple(_narrow(a) for a in node.args)
            node.kwargs = {name: _narrow(a) for name, a in node.kwargs.items()}
    if lowered:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(lowered))


def _of_float8(gm: GraphModule) -> set[Node]:
    """Return the nodes that round to float8 and back: they do so in float32."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if is_cast(node, DTYPE):
            chain = quantized_from(node)
            found.update((*chain, *(scale_nodes(chain[-2].args[1]) if chain else ())))
        elif (pair := dequantized(node)) is not None:
            found.update((node, *(n for n in pair.q.users if is_cast(n)), *scale_nodes(pair.scale)))
    return found


def _narrow(argument: Any) -> Any:
    """Return bfloat16 for float32, and anything else as it is: the argument of a cast."""
    return torch.bfloat16 if argument is torch.float32 else argument


def _kept(gm: GraphModule, precise: Collection[str]) -> set[Node]:
    """Return the nodes that keep float32.

    They depend on precise inputs and constants alone, are marked PRECISE, are arithmetic on such nodes alone,
    or are arithmetic that only a quantization reads. Functions of constants alone are the frequencies of sinusoids: times a
    timestep of 1000, their 8 bits would be an angle that is wrong by radians.
    """
    marks: dict[Node, set[str]] = {}
    kept: set[Node] = set()
    constant: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and constant.issuperset(node.all_input_nodes)
        ):
            constant.add(node)
        above = [marks[n] for n in value_inputs(node)]
        marks[node] = {str(node.target)} if node.op == "placeholder" else set().union(*above)
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        of_kept = op_name(node) in _ARITHMETIC and inputs and kept.issuperset(inputs)
        if (marks[node] and marks[node] <= set(precise)) or node.meta.get(PRECISE) or of_kept:
            kept.add(node)
    for node in reversed(gm.graph.nodes):
        alone = node.users and all(u.target is QUANTIZE or (u in kept and _feeds(u)) for u in node.users)
        if alone and op_name(node) in _ARITHMETIC:
            kept.add(node)
    kept |= constant
    kept -= {n for n in constant if _is_cast_weight(n) and not kept.intersection(n.users)}
    return kept - set(gm.graph.find_nodes(op="output"))


def _is_cast_weight(node: Node) -> bool:
    """Return True for a cast of a constant that is not computed: its values have no more bits than they are stored with."""
    return op_name(node) in ("to", "_to_copy") and all(n.op == "get_attr" for n in node.all_input_nodes)


def _feeds(node: Node) -> bool:
    return op_name(node) in _ARITHMETIC and not node.meta.get(PRECISE)


def _makes_float32(node: Node) -> bool:
    """Return True for float32 numbers made of no input: arange has more than bfloat16 can tell apart."""
    given = (*node.args, *node.kwargs.values())
    return node.op == "call_function" and not value_inputs(node) and torch.float32 in given


def _of_a_float_layer(node: Node) -> bool:
    """Return True for the pairs around layers without a kernel: they round in float32 and return float32."""
    return is_decomposed(node) and node.target is not QUANTIZE


def _holds_float32(node: Node, dtypes: dict[Node, torch.dtype]) -> bool:
    """Return True for a tuple of float32 tensors, such as split's, by the dtype of its items in use."""
    taken = [u for u in node.users if op_name(u) == "getitem"]
    return node not in dtypes and any(dtypes.get(u) is torch.float32 for u in taken)


def _give(
    gm: GraphModule,
    node: Node,
    wanted: torch.dtype,
    *,
    dtypes: dict[Node, torch.dtype],
    lowered: set[Node],
    casts: dict[tuple[Node, torch.dtype], Node],
) -> None:
    def cast(x: Node) -> Node:
        is_float = dtypes.get(x) is torch.float32
        found = torch.bfloat16 if x in lowered else torch.float32
        if not is_float or found is wanted:
            return x
        if (x, wanted) not in casts:
            casts[x, wanted] = _cast(gm, x, wanted)
        return casts[x, wanted]

    node.args = torch.fx.map_arg(node.args, cast)
    node.kwargs = torch.fx.map_arg(node.kwargs, cast)


def _cast(gm: GraphModule, x: Node, dtype: torch.dtype) -> Node:
    if x.op == "get_attr":
        target = f"{x.target}_{str(dtype).removeprefix('torch.')}"
        value: Tensor = attribute(gm, str(x.target))
        set_buffer(gm, target, value.to(dtype))
        with gm.graph.inserting_after(x):
            return gm.graph.get_attr(target)
    after = x
    if x.op == "placeholder":
        after = _last(gm.graph.find_nodes(op="placeholder"))
    with gm.graph.inserting_after(after):
        made: Node = gm.graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    return made


def _last(nodes: Iterable[Any]) -> Any:
    return list(nodes)[-1]
