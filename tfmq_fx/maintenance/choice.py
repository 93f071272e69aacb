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

    tensors: Mapping[str, int]  # the tensors it needs in the artefact: name -> bytes; features may share them
    distance: float  # mean cosine distance of the feature to float, over its keys
    effect: float | None = (
        None  # relative squared error of the network's output that this feature alone causes
    )

    @property
    def disturbance(self) -> float:
        """Return the value that is bounded: the larger of two squared relative errors, of the feature and the output."""
        return max(self.distance, self.effect or 0.0)


def choose(
    options: Mapping[str, Mapping[str, Option]], *, bound: float, budget: int | None = None
) -> dict[str, str]:
    """Choose the maintenance of each feature.

    Without a budget, minimise the bytes, with every feature's disturbance within the bound. A feature without such an
    option takes the one with its smallest disturbance. With a budget, minimise the sum of disturbances within the
    budget, and keep to the bound if the budget allows it.

    Features share bytes (the time embedding is needed until the last feature is cached). So the search is greedy: it
    starts from all reconstructed and from all cached, and flips one feature at a time while that helps.

    options: feature -> maintenance -> its cost and its disturbance.
    bound: on a feature's disturbance.
    budget: in bytes; None for no budget.

    Raises TFMQError, with the smallest possible size, for a budget below it.
    """

    def within(limit: float) -> dict[str, dict[str, Option]]:
        kept = {f: {m: o for m, o in given.items() if o.disturbance <= limit} for f, given in options.items()}
        best = {f: min(given, key=lambda m, g=given: g[m].disturbance) for f, given in options.items()}  # type: ignore[misc]
        return {f: kept[f] or {best[f]: options[f][best[f]]} for f in options}

    allowed = within(bound)
    if budget is None:
        return _smallest(allowed)
    for allowed in (allowed, within(math.inf)):  # noqa: B020 - the second only if the first does not fit
        least = _smallest(allowed)
        if total_bytes(options, least) <= budget:
            starts = [c for c in (least, *_ends(allowed)) if total_bytes(options, c) <= budget]
            upgraded = [_improve(c, allowed, budget) for c in starts]
            return min(upgraded, key=lambda c: (total_disturbance(options, c), total_bytes(options, c)))
    raise TFMQError(
        f"maintain_bytes={budget}: the temporal features need at least {total_bytes(options, least)} bytes; "
        "raise maintain_bytes, or use fewer timesteps, fewer bits, or cache_type='int8'."
    )


def total_bytes(options: Mapping[str, Mapping[str, Option]], chosen: Mapping[str, str]) -> int:
    """Return the bytes that all features need together. Shared tensors count once."""
    needed: dict[str, int] = {}
    for feature, maintenance in chosen.items():
        needed |= options[feature][maintenance].tensors
    return sum(needed.values())


def total_disturbance(options: Mapping[str, Mapping[str, Option]], chosen: Mapping[str, str]) -> float:
    """Return the sum of the features' disturbances."""
    return sum(options[f][m].disturbance for f, m in chosen.items())


def _ends(allowed: Mapping[str, Mapping[str, Option]]) -> list[dict[str, str]]:
    """Return two choices, all reconstructed and all cached, as far as each feature's options allow it."""
    return [
        {f: m if m in given else next(iter(given)) for f, given in allowed.items()}
        for m in (RECONSTRUCT, CACHE)
    ]


def _smallest(allowed: Mapping[str, Mapping[str, Option]]) -> dict[str, str]:
    """Search greedily from both ends for the fewest bytes, then the least disturbance."""

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
    """Make the flip that removes the most disturbance per added byte, as long as one fits the budget."""
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
