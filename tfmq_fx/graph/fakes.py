"""Find the shapes and dtypes of a graph's nodes for a batch of any size, without tracing the graph anew."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from tfmq_fx.graph.nodes import attribute, fake_mode_of, meta_value


def set_fake_values(
    gm: GraphModule,
    inputs: Mapping[str, Tensor],
    *,
    dynamic: Mapping[str, Collection[int]],
    apart: Collection[tuple[str, int]] = (),
) -> None:
    """Give every node its fake value (`meta_value`) and its "tensor_meta", as torch.export would.

    inputs: an example of each input by name, in the order of the graph. dynamic: by name, the dimensions that may have
    any size; those that have one size in the example have one symbol. apart: inputs and dimensions of them that each have a
    symbol of their own.
    """
    run = _Fakes(gm)
    with torch.no_grad():
        run.run(
            *(
                run.symbolic(x, dynamic.get(name, ()), {i for n, i in apart if n == name})
                for name, x in inputs.items()
            )
        )


def fill_fake_values(gm: GraphModule) -> None:
    """Give the nodes that have no fake value theirs, from those of their inputs: after passes that made nodes."""
    mode = fake_mode_of(gm.graph.nodes)
    assert mode is not None
    with torch.no_grad(), mode, enable_python_dispatcher():
        for node in gm.graph.nodes:
            if meta_value(node) is not None or node.op not in ("get_attr", "call_function"):
                continue
            if node.op == "get_attr":
                x = attribute(gm, str(node.target))
                node.meta["val"] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                continue
            args, kwargs = map_arg((node.args, node.kwargs), meta_value)
            node.meta["val"] = node.target(*args, **kwargs)


class _Fakes(Interpreter):
    """An interpreter that runs the graph once, on fake tensors, and leaves its own with each node."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # or torch would append its own text to a message
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.known: dict[Hashable, Any] = {}  # what equal calls return

    def symbolic(self, x: Tensor, dynamic: Collection[int], apart: Collection[int]) -> Tensor:
        kinds = {**dict.fromkeys(dynamic, DimDynamic.DUCK), **dict.fromkeys(apart, DimDynamic.DYNAMIC)}
        sizes = [kinds.get(i, DimDynamic.STATIC) for i in range(x.dim())]
        return self.mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode, enable_python_dispatcher():  # torch's own C++ would turn some sizes into constants
            return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        kind = kind_of_call(n)
        value = self.known[kind] if kind in self.known else super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if kind is not None:
            self.known[kind] = value
        if n.op != "output":
            n.meta["val"] = value
            n.meta["tensor_meta"] = pytree.tree_map_only(Tensor, _described, value)
        return value


def _described(x: Tensor) -> TensorMetadata:
    """Return what torch.export says of a tensor beside its fake value; OpenVINO reads this."""
    return TensorMetadata(x.shape, x.dtype, False, x.stride(), None, False, {})


def kind_of_call(node: Node) -> Hashable | None:
    """Return all that shapes and dtypes of a call's result depend on, and the operators that compute it.

    None for other nodes, and for operators whose result has a size of its own in each call.
    """
    tags = getattr(node.target, "tags", ())
    if (
        node.op != "call_function"
        or torch.Tag.dynamic_output_shape in tags
        or torch.Tag.data_dependent_output in tags
    ):
        return None
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    places = {x: i for i, x in enumerate(node.all_input_nodes)}
    values = (
        (places[x], _kind_of_value(meta_value(x))) if isinstance(x, Node) else (type(x), str(x)) for x in flat
    )
    return node.target, spec, tuple(values)


def _kind_of_value(value: Any) -> Hashable:
    """Return a fake value but for its memory."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind_of_value, value))
    if not isinstance(value, Tensor):
        return type(value), _size(value)
    sizes, strides = (tuple(map(_size, x)) for x in (value.shape, value.stride()))
    return value.dtype, value.device, sizes, strides


def _size(value: Any) -> Hashable:
    return value.node.expr if isinstance(value, torch.SymInt) else str(value)
