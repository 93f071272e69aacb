"""Compute weights that are functions of parameters alone once, so that they are parameters themselves."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.graph.constants import constants, parameters_under, values_of
from tfmq_fx.graph.nodes import set_parameter, weight_argument
from tfmq_fx.graph.state import captured_of, set_state

_ROLES = ("weight", "bias")  # a layer's bias follows its weight


def fold_parameters(gm: GraphModule) -> PassResult:
    """Fold the constant weights and biases of layers. Bitwise unchanged.

        w = original1 * original0 / norm(original1); conv2d(x, w)  ==>  conv2d(x, weight)

    weight_norm, spectral_norm, standardised and normalised weights, and slices of a packed projection are such
    functions. Layers that read the same value share one parameter, and a slice stays where it is in memory. What a timestep or another input reaches
    stays as it is, and so does what is computed from buffers that the network updates, or from random numbers.
    `captured_of(gm).folded` has the new parameters and those that they were computed from.
    """
    fixed = constants(gm)
    found: dict[Node, tuple[Node, str]] = {}  # computed value -> the first layer that reads it, and its role
    for layer, role, value in _arguments(gm):
        if value.op == "call_function" and value in fixed:
            found.setdefault(value, (layer, role))
    if not found:
        return PassResult(gm, False)
    values, read = values_of(gm, found), _read_besides(gm, found)
    sources = {value: tuple(parameters_under(gm, value)) for value in found}
    firsts = _by_value(values, sources)
    wanted = {value: _wanted_name(*found[value], sources[value]) for value in firsts.values()}
    names = _distinct(wanted, taken=read | {path for path, _ in gm.named_modules()})
    for value, name in names.items():
        set_parameter(gm, name, values[value])
    for value, first in firsts.items():
        with gm.graph.inserting_before(value):
            constant = gm.graph.get_attr(names[first])
        constant.meta = dict(value.meta)
        value.replace_all_uses_with(constant)
    gm.graph.eliminate_dead_code()
    for path in {p for paths in sources.values() for p in paths} - read - set(names.values()):
        module, _, name = path.rpartition(".")
        delattr(gm.get_submodule(module), name)
    gm.graph.lint()
    gm.recompile()
    state = captured_of(gm)
    made = {name: sources[value] for value, name in names.items()}
    set_state(gm, dataclasses.replace(state, folded={**state.folded, **made}))
    return PassResult(gm, True)


def _arguments(gm: GraphModule) -> Iterator[tuple[Node, str, Node]]:
    """Yield each layer with its weight and its bias, as far as they are nodes."""
    for node in gm.graph.nodes:
        index = weight_argument(node)
        if index is None:
            continue
        for role, value in zip(_ROLES, node.args[index : index + 2], strict=False):
            if isinstance(value, Node):
                yield node, role, value


def _by_value(values: Mapping[Node, Tensor], sources: Mapping[Node, tuple[str, ...]]) -> dict[Node, Node]:
    """Return each node -> the first with the same value from the same parameters, so that shared weights stay so."""
    firsts: dict[Node, Node] = {}
    for node, value in values.items():
        known = (n for n in firsts.values() if sources[n] == sources[node] and _equal(values[n], value))
        firsts[node] = next(known, node)
    return firsts


def _equal(a: Tensor, b: Tensor) -> bool:
    fake = isinstance(a, FakeTensor) or isinstance(b, FakeTensor)  # a shape without values
    return a is b or (not fake and a.dtype == b.dtype and torch.equal(a, b))


def _read_besides(gm: GraphModule, values: Collection[Node]) -> set[str]:
    """Return the paths of the constants that the graph reads for more than these values."""
    alive: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "output" or node.is_impure() or any(u in alive for u in node.users if u not in values):
            alive.add(node)
    return {str(n.target) for n in alive if n.op == "get_attr"}


def _wanted_name(layer: Node, role: str, sources: tuple[str, ...]) -> str:
    """Return the path of the only parameter that the value is computed from, or one in the module of its layer."""
    if len(sources) == 1:
        return sources[0]
    stack = list(layer.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return f"{path}.{role}" if path else f"{layer.name}_{role}"


def _distinct(wanted: Mapping[Node, str], *, taken: set[str]) -> dict[Node, str]:
    """Return the names that are wanted, with numbers where several want one that is taken, or the same one."""
    counts = Counter(wanted.values())
    found: dict[Node, str] = {}
    for node, name in wanted.items():
        free = (f"{name}_{i}" for i in itertools.count())
        alone = counts[name] == 1 and name not in taken
        found[node] = name if alone else next(n for n in free if n not in taken and n not in found.values())
    return found
