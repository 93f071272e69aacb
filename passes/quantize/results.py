"""Results of the stages after `prepare`: frozen records, kept in the graph's `State`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CachedFeature:
    """A temporal feature that is looked up in a table."""

    name: str
    key: tuple[str, ...]  # the inputs whose values select the row
    table: str  # the buffer that holds it, along with other features
    columns: tuple[int, int]  # of the buffer: first, and one past the last


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """The result of reconstruction for one block, or of tuning for the network.

    Errors are mean squared errors against the float stream. Those of a block outside the temporal one are of its quantized
    weights: activations are in float meanwhile, unless their scales are learned. Those of tuning have both, relative to each
    timestep's error before tuning, so that `error_nearest` is 1.
    """

    name: str
    weights: int  # weights whose rounding was learned
    error_nearest: float
    error: float
    kept: str  # "learned", "gptq" or "tuned"; "nearest" or "untuned" if nothing helped
    seconds: float
    hessian_pieces: int = 1  # the most pieces into which GPTQ cut a layer's columns, to fit in gptq_memory


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The choice for one temporal feature: how it is maintained, and why."""

    feature: str  # node name
    path: str  # its layer's weight in the network's state dict; the node name if it has none
    key: tuple[str, ...]  # the inputs that select the row of a table; () if it can have no table
    bytes: dict[str, int]  # by maintenance: the bytes that no other feature needs
    disturbance: dict[str, float]  # by maintenance: cosine distance
    # By maintenance: relative squared error of the output; {} if it was not measured.
    effect: dict[str, float]
    chosen: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Maintenance:
    """The choices of `maintain` for the temporal features, and their cost."""

    bound: float | None  # on a feature's disturbance; None: nothing was measured, everything is cached
    budget: int | None  # in bytes; None: the fewest within the bound
    cache_type: str  # of the tables
    features: tuple[Decision, ...]
    # If every feature is reconstructed, if every feature that can be is cached, and as chosen.
    bytes: dict[str, int]
    seconds_per_call: dict[str, float]  # of the temporal block, reconstructed and as chosen
