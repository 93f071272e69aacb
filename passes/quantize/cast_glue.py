"""Let a converted graph compute in another precision between its integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from tfmq_fx.base.arithmetic import NETWORK_DTYPES
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.float8 import float8_scales
from tfmq_fx.graph.nodes import (
    aten,
    attribute,
    fresh,
    is_decomposed,
    matmul_inputs,
    op_name,
    out_dtype,
    set_buffer,
    weight_argument,
)
from tfmq_fx.passes.pass_manager import declare

_NORMS = ("group_norm", "layer_norm", "batch_norm", "rms_norm", "native_group_norm", "native_layer_norm")
_CASTS = (aten.to.dtype, aten._to_copy.default)


@declare(after=("convert",))
def cast_glue(
    gm: GraphModule, inputs: Sequence[Tensor], *, before: torch.dtype, after: torch.dtype
) -> GraphModule:
    """Return a copy of a converted graph that computes in `after` where it computed in `before`.

        dequantize(q, s, z) -> linear(., w, b)   ==>   dequantize(q, s, z, out_dtype=after) -> linear(., w, to(b, after))

    Integers, scales, zero points and tables keep their values and dtypes; everything is quantized in float32.

    inputs: tensors in the shapes, dtypes and order of the graph's inputs; their values are not read.
    before: float16 or bfloat16: every cast to it becomes one to `after`. float32: what the graph does with its
        inputs and layers is done in `after`. Constants that it makes itself, explicit casts to float32, and the
        temporal block up to its first layer stay in float32: eight bits are not enough for timesteps up to 1000.

    Numerics: float tensors are rounded to `after`, and so is each result. From half precision to float32, the
    tensors keep their values. Raises TFMQError for other dtypes.
    """
    if not {before, after} <= {*NETWORK_DTYPES}:
        raise TFMQError(f"cast_glue: from {before} to {after}; both must be float32, float16 or bfloat16.")
    gm = _copied(gm)
    for module in _graphs(gm):
        scales = float8_scales(module)
        for node in module.graph.nodes:
            if node in scales:
                continue
            if node.op == "get_attr" and _is_glue(module, node, before, temporal=module is not gm):
                set_buffer(module, str(node.target), attribute(module, str(node.target)).detach().to(after))
            elif is_decomposed(node) and op_name(node).startswith("dequantize"):
                _dequantize_to(node, before, after)
            elif before != torch.float32:
                node.args, node.kwargs = map_aggregate(
                    (node.args, node.kwargs), lambda a: after if a is before else a
                )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        _Meetings(gm, after, mode).run(*(mode.from_tensor(x) for x in inputs))
    for module in _graphs(gm):
        module.graph.lint()
        module.recompile()
    return gm


def _copied(gm: GraphModule) -> GraphModule:
    copy = fresh(gm)
    for name, child in list(copy.named_children()):
        if isinstance(child, GraphModule):
            copy.set_submodule(name, _copied(child))
    return copy


def _graphs(gm: GraphModule) -> Iterator[GraphModule]:
    return (m for m in gm.modules() if isinstance(m, GraphModule))


def _is_glue(module: GraphModule, node: Node, before: torch.dtype, *, temporal: bool) -> bool:
    """Return True if a tensor of the graph is computed with in the network's precision, and is not a scale.

    A tensor that is only read through a cast (a table, a low-rank factor) is stored in that dtype for its size.
    """
    if attribute(module, str(node.target)).dtype != before:
        return False
    readers = [r for u in node.users for r in (u.users if op_name(u) == "index_select" else (u,))]
    if temporal and before == torch.float32:
        return bool(readers) and all(weight_argument(r) is not None or op_name(r) in _NORMS for r in readers)
    return not any(is_decomposed(r) for r in readers) and not all(r.target in _CASTS for r in readers)


def _dequantize_to(node: Node, before: torch.dtype, after: torch.dtype) -> None:
    """Let a dequantization return `after` instead of `before`."""
    if op_name(node) == "dequantize_per_token":
        if node.args[-1] is before:
            node.args = (*node.args[:-1], after)
    elif node.kwargs.get("out_dtype", torch.float32) is before:
        node.kwargs = out_dtype(after)


class _Meetings(Interpreter):
    """An interpreter, on fake tensors, that inserts casts where an operator would meet two precisions it cannot mix.

    What the graph returns gets the new precision.
    """

    def __init__(self, gm: GraphModule, dtype: torch.dtype, mode: FakeTensorMode) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.dtype, self.mode = dtype, mode

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _Meetings(self.fetch_attr(target), self.dtype, self.mode).run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        wanted = self._wanted(n)
        if wanted is not None:
            self._give(n, wanted)
        return super().run_node(n)

    def _wanted(self, n: Node) -> torch.dtype | None:
        """Return the dtype that a node needs all its float inputs in; None if it takes any."""
        if n.op == "output":
            return self.dtype
        found = {x: self.env[x].dtype for x in n.all_input_nodes if _is_float(self.env.get(x))}
        if n.op != "call_function" or len({*found.values()}) < 2:
            return None
        if op_name(n) in _NORMS:
            return found.get(n.args[0])  # type: ignore[arg-type]
        return self.dtype if weight_argument(n) is not None or matmul_inputs(n) else None

    def _give(self, n: Node, dtype: torch.dtype) -> None:
        """Let a node read its float inputs through casts to this dtype."""
        for x in n.all_input_nodes:
            if not _is_float(self.env[x]) or self.env[x].dtype == dtype:
                continue
            with n.graph.inserting_before(n):
                cast = n.graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
            self.env[cast] = self.env[x].to(dtype)
            n.replace_input_with(x, cast)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
