"""A converted graph, with what it takes from outside of it, behind the float network's calling convention."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.artefact.forms import closed_graph, float_graph, opened_graph, without_module
from tfmq_fx.artefact.gradients import wants_gradient, with_gradients
from tfmq_fx.artefact.graph_json import graph_to_json
from tfmq_fx.artefact.outside import Outside
from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.passes.quantize.cast_glue import cast_glue
from tfmq_fx.passes.temporal.insert_step_index import TIMESTEPS
from tfmq_fx.passes.temporal.partition_temporal import BLOCK_NAME, temporal_block_of


class QuantizedGraph(DropIn):
    """A converted graph behind the float network's calling convention. All runtimes start from it.

    outside: the float temporal block beside the graph, if it makes features that the graph takes as inputs, after its
        own, or features at values that are in no table. None: the graph computes or has everything.
    """

    network: GraphModule
    kind = "quantized"  # of the artefact

    def __init__(self, network: GraphModule, *, outside: Outside | None = None, **parts: Any) -> None:
        super().__init__(network, **parts)
        _own(network)
        self.outside = outside
        self._made: dict[str, GraphModule] = {}  # other forms of the graph, on the same tensors

    def __reduce__(self) -> Any:
        new, arguments, state = super().__reduce__()
        return new, arguments, {**state, "_made": {}}

    def parts(self) -> dict[str, Any]:
        more = {} if self.outside is None else {"outside": self.outside}
        return super().parts() | more

    @property
    def temporal_block(self) -> GraphModule:
        """Return the temporal block: timestep (N,), and the conditioning that joins it -> features."""
        if self.outside is not None and BLOCK_NAME not in self.network._modules:
            return self.outside.block
        return temporal_block_of(self.network)

    def in_float32(self) -> QuantizedGraph:
        """Return the same network in float32, with the same integers; itself if it is."""
        return self if self.dtype == torch.float32 else type(self)(self.network, **self.parts()).float()

    def with_fixed_sizes(self) -> tuple[QuantizedGraph, tuple[str, ...]]:
        """Return the network for no sizes but those of the capture, apart from the batch, and a note if it took others."""
        moves = self.interface.moves()
        if not moves:
            return self, ()
        model = type(self)(self.network, **{**self.parts(), "interface": self.interface.fixed()})
        names = dict.fromkeys(name for name, _ in moves)
        return model, (f"takes {', '.join(f'{n} as {model._shown(n)}' for n in names)} alone",)

    def closed(self, *, strict: bool = False) -> tuple[QuantizedGraph, tuple[str, ...]]:
        """Return the network with the temporal block in it, for what runs a graph alone, and notes on what differs.

        It is the network itself if the graph has everything. strict: raise TFMQError for what differs.
        """
        notes = []
        if self.outside is None:
            return self, ()
        if self.outside.taken:
            size = f"{self.outside.size} bytes of the float temporal block"
            notes.append(
                f"{size} are in it, and compute the features that depend on {', '.join(self.outside.conditions)}"
            )
        if self.recipe.get("unseen") == "float":
            notes.append("a timestep or value outside the tables takes the features of its nearest neighbour")
        if strict and notes:
            raise TFMQError(f"strict: {'; '.join(notes)}.")
        network = self._closed() if self.outside.taken else self.network
        return type(self)(network, **{**self.parts(), "outside": None}), tuple(notes)

    def _closed(self) -> GraphModule:
        assert self.outside is not None
        if "closed" not in self._made:
            self._made["closed"] = closed_graph(
                self.network, self.outside, self.device, taken=self.outside.taken
            )
        return self._made["closed"]

    def restored(self) -> GraphModule:
        """Return a graph that computes all features from the inputs, as the float network did; the graph itself if it cannot."""
        gm = self.network
        if self.outside is not None:
            gm = closed_graph(self._opened(), self.outside, self.device, taken=self.outside.features)
        return float_graph(without_module(gm), tables=(TIMESTEPS, *(f"{name}_table" for name in self.finite)))

    def _precise(self) -> Collection[str]:
        block = {} if self.outside is None else placeholders(self.outside.block)
        return {self.interface.timestep, *placeholders(self.temporal_block), *block}

    def _cast_code(self, dtype: torch.dtype) -> None:
        before = self.dtype
        super()._cast_code(dtype)
        inputs = example_inputs(self, batch=2)
        taken = [] if self.outside is None else self.outside.taken_of(inputs)
        self.network = cast_glue(self.network, [*inputs.values(), *taken], before=before, after=dtype)
        _own(self.network)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._made = {}
        if self.outside is not None:
            self.outside.follow(self.device)
        return self

    def _compute(self, inputs: list[Tensor]) -> Any:
        """Run the graph, with straight-through gradients if an input needs one.

        In the caller's autocast, its float operators use that precision, as the float network's do.
        """
        network = self.network
        more: list[Tensor] = []
        if self.outside is not None:
            network, more = self._with_features(inputs)
        return (
            with_gradients(network, [*inputs, *more]) if wants_gradient(inputs) else network(*inputs, *more)
        )

    def _with_features(self, inputs: list[Tensor]) -> tuple[GraphModule, list[Tensor]]:
        """Return the form of the graph that computes a call, and the features that it takes beside the inputs."""
        assert self.outside is not None
        # An export needs a graph without anything outside.
        if any(isinstance(x, FakeTensor) for x in inputs):
            return (self._closed() if self.outside.taken else self.network), []
        kind, more = self._features(inputs)
        return (self._opened() if kind == "opened" else self.network), more

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _features(self, inputs: list[Tensor]) -> tuple[str, list[Tensor]]:
        """Return the form of the graph, and its features: all of them where a value is in no table."""
        assert self.outside is not None
        given = dict(zip(self.interface.inputs, inputs, strict=True))
        with neutral():
            if self.recipe.get("unseen") == "float" and not self.outside.covers(given):
                return "opened", self.outside.evaluate(given)
            taken = self.outside.look_up(given) if self.outside.taken else []
            if not self.outside.rounds_at(given):
                return "network", taken
            found = dict(zip(self.outside.features, self.outside.at_rows(given), strict=True))
            return "opened", list((found | dict(zip(self.outside.taken, taken, strict=True))).values())

    def _opened(self) -> GraphModule:
        """Return the graph with all features as inputs, in the block's order."""
        assert self.outside is not None
        if "opened" not in self._made:
            self._made["opened"] = opened_graph(self.network, self.outside.features)
        return self._made["opened"]

    @neutral()
    def get_extra_state(self) -> Tensor:
        """Return a digest of what a state dict lacks: the graph, with the scales that are constants in it."""
        tables = {name: values.tolist() for name, values in {"": self.timesteps, **self.finite}.items()}
        digest = hashlib.sha256(json.dumps([_written(self.network), tables]).encode()).digest()
        return torch.tensor(list(digest), dtype=torch.uint8)

    @neutral()
    def set_extra_state(self, state: Any) -> None:
        """Check that a state dict fits. Raises TFMQError, before anything is loaded, if its network had other constants."""
        if not torch.equal(torch.as_tensor(state).cpu(), self.get_extra_state()):
            raise TFMQError(
                "load_state_dict: the state dict is of a network with another graph or other scales, which a state dict does "
                "not hold; use save_pretrained(folder) and tfmq_fx.load(folder)."
            )


def _own(network: GraphModule) -> None:
    """Let a graph be a quantized network's, as it is when it is loaded: with buffers alone, and loaded only as a part of it."""
    used = {str(n.target).partition(".")[0] for n in network.graph.find_nodes(op="get_attr")}
    for name in [n for n in network._buffers if n not in used]:
        del network._buffers[name]
    for module in network.modules():
        for name, p in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if p is None else p.detach())
    network.eval()
    network.register_load_state_dict_pre_hook(_refuse_graph_alone)  # type: ignore[no-untyped-call]


def _refuse_graph_alone(_network: nn.Module, _state: Any, prefix: str, *_: Any) -> None:
    """Raise TFMQError if a state dict is loaded into a graph by itself, which has no entry that tells if it fits."""
    if not prefix:
        raise TFMQError(
            "load_state_dict: the state dict of q.network lacks the scales, which are constants of the graph; use "
            "q.load_state_dict(q.state_dict()), or save_pretrained(folder) and tfmq_fx.load(folder)."
        )


def example_inputs(model: QuantizedGraph, *, batch: int) -> dict[str, Tensor]:
    """Return zeros in the shapes and dtypes of the graph's inputs; that of the batch is `batch`, others as captured."""
    moves = model.interface.moves()
    return {
        name: torch.zeros(
            [moves.get((name, i), batch) if s is None else s for i, s in enumerate(spec["shape"])],
            dtype=getattr(torch, spec["dtype"]),
            device=model.device,
        )
        for name, spec in model.interface.inputs.items()
    }


def _written(network: GraphModule) -> Any:
    """Return all nodes of a graph, constants included, as JSON; as text if JSON cannot hold one of them."""
    try:
        return graph_to_json(network)
    except TFMQError:
        return [str(m.graph) for m in network.modules() if isinstance(m, GraphModule)]
