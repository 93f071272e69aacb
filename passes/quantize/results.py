"""What the stages after `prepare` report: frozen records, kept in the graph's `State`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CachedFeature:
    """A temporal feature that is looked up in a table."""

    name: str
    key: tuple[str, ...]  # the inputs whose values select the row
    table: str  # the buffer that holds it, beside other features
    columns: tuple[int, int]  # from, to


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What reconstruction did to one block, or tuning to the network; errors are mean squared, against the float stream.

    Those of tuning are in units of what each timestep's error was before it: `error_nearest` is 1.
    """

    name: str
    weights: int  # weights whose rounding was learned
    error_nearest: float
    error: float
    kept: str  # "learned", "gptq" or "tuned"; "nearest", or "untuned", where nothing helped
    seconds: float
    hessian_pieces: int = 1  # the most pieces that GPTQ cut a layer's columns into, to keep to gptq_memory


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How one temporal feature is maintained, and why."""

    feature: str  # node name
    path: str  # its layer's weight in the network's state dict; its node's name where it has none
    key: tuple[str, ...]  # the inputs that select the row of a table; () where it can have none
    bytes: dict[str, int]  # by maintenance: of what no other feature needs
    disturbance: dict[str, float]  # by maintenance: cosine distance
    # By maintenance: relative squared error of the output; {} where it was not measured.
    effect: dict[str, float]
    chosen: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Maintenance:
    """What `maintain` chose for the temporal features, and what that costs."""

    bound: float | None  # on a feature's disturbance; None: nothing was measured, everything is cached
    budget: int | None  # in bytes; None: the fewest within the bound
    cache_type: str  # of the tables
    features: tuple[Decision, ...]
    bytes: dict[
        str, int
    ]  # of everything reconstructed, of everything cached that can be, and of what was chosen
    seconds_per_call: dict[str, float]  # of the temporal block, reconstructed and as chosen
