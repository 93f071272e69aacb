"""Choose the maintenance of each temporal feature by its bytes and its disturbance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tfmq_fx.base.errors import TFMQError

RECONSTRUCT, CACHE = "reconstruct", "cache"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to maintain one feature."""

    tensors: Mapping[str, int]  # what it needs in the artefact: name -> bytes; features may share names
    distance: float  # mean cosine distance of the feature to float, over its keys
    effect: float | None = None  # relative squared error that it alone makes in the network's output

    @property
    def disturbance(self) -> float:
        """What the bound is on: the larger of two squared relative errors, of the feature and of the output."""
        return max(self.distance, self.effect or 0.0)


def choose(
    options: Mapping[str, Mapping[str, Option]], *, bound: float, budget: int | None = None
) -> dict[str, str]:
    """The maintenance of each feature; options: feature -> maintenance -> what it costs and does.

    Without a budget: the fewest bytes with every feature's disturbance within the bound; a feature of which no option
    is takes its smallest disturbance. With a budget: the smallest sum of disturbances that fits it, within the bound as
    far as that fits. Features share bytes (the time embedding is needed until the last of them is cached), so the
    search starts from both pure ends and flips one feature at a time while that helps.

    Raises TFMQError for a budget below the smallest choice, saying that one's size.
    """

    def within(limit: float) -> dict[str, dict[str, Option]]:
        kept = {f: {m: o for m, o in given.items() if o.disturbance <= limit} for f, given in options.items()}
        best = {f: min(given, key=lambda m, g=given: g[m].disturbance) for f, given in options.items()}  # type: ignore[misc]
        return {f: kept[f] or {best[f]: options[f][best[f]]} for f in options}

    allowed = within(bound)
    if budget is None:
        return _smallest(allowed)
    for allowed in (allowed, within(math.inf)):  # noqa: B020 - the second only where the first does not fit
        least = _smallest(allowed)
        if total_bytes(options, least) <= budget:
            starts = [c for c in (least, *_ends(allowed)) if total_bytes(options, c) <= budget]
            upgraded = [_improve(c, allowed, budget) for c in starts]
            return min(upgraded, key=lambda c: (total_disturbance(options, c), total_bytes(options, c)))
    raise TFMQError(
        f"maintain_bytes={budget}: the temporal features need {total_bytes(options, least)} bytes at least; "
        "raise it, or use fewer timesteps, bits or cache_type='int8'."
    )


def total_bytes(options: Mapping[str, Mapping[str, Option]], chosen: Mapping[str, str]) -> int:
    """Of all that the features need, what they share being counted once."""
    needed: dict[str, int] = {}
    for feature, maintenance in chosen.items():
        needed |= options[feature][maintenance].tensors
    return sum(needed.values())


def total_disturbance(options: Mapping[str, Mapping[str, Option]], chosen: Mapping[str, str]) -> float:
    return sum(options[f][m].disturbance for f, m in chosen.items())


def _ends(allowed: Mapping[str, Mapping[str, Option]]) -> list[dict[str, str]]:
    """All of one kind, as far as each feature may."""
    return [
        {f: m if m in given else next(iter(given)) for f, given in allowed.items()}
        for m in (RECONSTRUCT, CACHE)
    ]


def _smallest(allowed: Mapping[str, Mapping[str, Option]]) -> dict[str, str]:
    """Greedy from both ends: the fewest bytes, then the least disturbance."""

    def cost(chosen: Mapping[str, str]) -> tuple[int, float]:
        return total_bytes(allowed, chosen), total_disturbance(allowed, chosen)

    found = []
    for current in _ends(allowed):
        while flips := [c for c in _flips(current, allowed) if cost(c) < cost(current)]:
            current = min(flips, key=cost)
        found.append(current)
    return min(found, key=cost)


def _improve(
    chosen: dict[str, str], allowed: Mapping[str, Mapping[str, Option]], budget: int
) -> dict[str, str]:
    """Greedy: the flip that takes away the most disturbance per byte, while the budget allows one."""
    size, harm = total_bytes(allowed, chosen), total_disturbance(allowed, chosen)
    best, rate = None, 0.0
    for flip in _flips(chosen, allowed):
        gain, added = harm - total_disturbance(allowed, flip), total_bytes(allowed, flip) - size
        if gain > 0 and size + added <= budget and gain / max(added, 1) > rate:
            best, rate = flip, gain / max(added, 1)
    return chosen if best is None else _improve(best, allowed, budget)


def _flips(
    chosen: Mapping[str, str], allowed: Mapping[str, Mapping[str, Option]]
) -> Iterable[dict[str, str]]:
    for feature, given in allowed.items():
        for maintenance in given:
            if maintenance != chosen[feature]:
                yield {**chosen, feature: maintenance}
