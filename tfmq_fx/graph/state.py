"""What is known of a captured graph beside its nodes: one frozen value in the graph's meta.

A pass reads it, and puts a new one in its place; nothing else is kept in a graph's meta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule

from tfmq_fx.base.errors import require_type

_KEY = "tfmq"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a low-bit pass did to one layer."""

    name: str  # the weight's path
    how: str  # "folded": nothing is left to compute; "explicit": new nodes at its input; "left": as it was
    reason: str = ""  # why not folded, or why left; what it was folded into
    tensors: tuple[str, ...] = ()  # paths of what the graph now reads in addition


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What is known of a float graph. A prepared one has a `passes.quantize.state.State`, which adds to it."""

    stage: str = ""  # the last stage it went through: "prepared", "calibrated", ...; "" for a float graph
    timestep: str | None = None  # the name of the input that carries the timestep; None: not recorded
    inputs: tuple[int, ...] | None = (
        None  # what `bind_parameters` left of the inputs: their old positions; None: all
    )
    nonzero: tuple[
        str, ...
    ] = ()  # inputs of which the network asked, while it was traced, whether they are 0 everywhere
    # What `fold_parameters` computed: the new parameter's path -> those of the parameters it is a function of.
    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    low_bits: Mapping[str, tuple[Change, ...]] = field(
        default_factory=dict
    )  # pass -> what it did, layer by layer


def captured_of(gm: GraphModule) -> Captured:
    """Return what is known of a graph; of one that nobody captured here, nothing. Raises TFMQError for anything else."""
    require_type(gm, GraphModule, "gm", "capture the network first: tfmq_fx.capture(network, example)")
    found = gm.meta.get(_KEY, Captured())
    assert isinstance(found, Captured)
    return found


def set_state(gm: GraphModule, state: Captured) -> None:
    """Replace what is known of a graph."""
    gm.meta[_KEY] = state
