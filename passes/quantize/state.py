"""The state of a graph that is being quantized: one frozen value, which each stage reads and replaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.state import Captured, Change, captured_of  # noqa: F401 (of an inherited annotation)
from tfmq_fx.passes.quantize.plan import Note, Plan, table_key
from tfmq_fx.passes.quantize.results import BlockResult, CachedFeature, Maintenance
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, find_temporal
from tfmq_fx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class State(Captured):
    """The facts about a graph that `prepare` and the stages after it record. `convert` keeps all of them.

    Invariants: `features`, `feature_keys` and `feature_paths` have the same length; `timestep` comes first in
    `tables`; each stage writes only its own fields, and adds notes to `plan`.
    """

    # Written by `prepare`.
    timestep: str  # the name of the input that carries the timestep
    recipe: Recipe
    plan: Plan  # how each layer is quantized; without the layers that `cache_temporal` removes
    timesteps: Tensor  # the schedule (T,)
    # Other inputs with finitely many values -> (K, ...).
    finite: Mapping[str, Tensor] = field(default_factory=dict)
    conditioning: tuple[str, ...] = ()  # inputs that join the timestep inside the temporal block
    features: tuple[str, ...]  # the temporal features, by node name
    feature_keys: tuple[tuple[str, ...], ...]  # for each feature, the inputs that it depends on
    feature_paths: tuple[str, ...]  # for each feature, its layer's weight; the node name if it has none
    # The keys of the block's activations: each one is the inputs that select an activation's qparams.
    keys: frozenset[tuple[str, ...]] = frozenset()
    # Written by `reconstruct`, `cache_temporal` and `maintain`.
    reconstruction: tuple[BlockResult, ...] = ()
    cached: tuple[CachedFeature, ...] = ()  # the features that are looked up
    # The features that are inputs of the graph: what holds the graph computes them. They have left `features`.
    outside: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()  # paths of the parameters that are no longer read
    maintenance: Maintenance | None = None  # None: every feature is reconstructed

    @property
    def tables(self) -> dict[str, Tensor]:
        """Return the values (K, ...) of the finite inputs by name, the timestep first."""
        return {self.timestep: self.timesteps, **self.finite}

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of values of each finite input, the timestep first."""
        return {name: len(values) for name, values in self.tables.items()}

    def inputs_of_feature(self, name: str) -> tuple[str, ...]:
        """Return the inputs that a feature depends on."""
        return self.feature_keys[self.features.index(name)]

    def table_key_of(self, inputs: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return the key of a table over these inputs; None if one is not finite or the table would be too large."""
        limit = self.recipe.max_table_entries
        return table_key(frozenset(inputs), timestep=self.timestep, sizes=self.sizes, max_entries=limit)

    def with_notes(self, *notes: Note) -> State:
        """Return this state with more notes in its plan."""
        plan = dataclasses.replace(self.plan, notes=(*self.plan.notes, *notes))
        return dataclasses.replace(self, plan=plan)


def state_of(gm: GraphModule) -> State:
    """Return the state of a graph that went through `prepare`. Raises TFMQError for a float graph."""
    return require_stage(gm, "prepared", "calibrated", "reconstructed", "converted")


def require_stage(gm: GraphModule, *stages: str) -> State:
    """Return the graph's state. Raises TFMQError unless the last stage it went through is one of these."""
    found = captured_of(gm)
    if not isinstance(found, State) or found.stage not in stages:
        raise TFMQError(
            f"the graph is {found.stage or 'a float graph'}, but this step needs one that is {' or '.join(stages)}; "
            "the order is prepare, calibrate, reconstruct, convert."
        )
    return found


def temporal_of(gm: GraphModule) -> TemporalBlock:
    """Find the temporal block of a graph that went through `prepare`, despite its observers and look-ups.

    It is empty if every feature is an input of the graph.
    """
    state = state_of(gm)
    if not state.features:  # all are inputs
        return TemporalBlock(timestep=state.timestep, nodes=(), features=(), keys=(), feature_keys=())
    return find_temporal(
        gm, timestep=state.timestep, conditioning=state.conditioning, features=state.features
    )
