"""Make temporal features inputs of the graph, so that what computes them can be elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.state import set_state
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.quantize.cache_temporal import (
    constants_read,
    erase_unneeded,
    forget,
    rename_layers,
    stand_for,
)
from tfmq_fx.passes.quantize.state import require_stage, state_of, temporal_of
from tfmq_fx.passes.temporal.partition_temporal import separate


@declare(needs=("prepare",), after=("calibrate", "reconstruct"))
def open_temporal(gm: GraphModule, *, features: Iterable[str]) -> PassResult:
    """Replace temporal features of a calibrated graph by inputs of their names. Remove what no other feature needs.

        timestep, y -> .. -> linear(., W_i) = f_i -> rest     ==>    f_i -> rest

    The new inputs come after the graph's own, in the order of the features.

    Numerics: bitwise unchanged for inputs that have the features' values. The graph's state lists them (`outside`), and they leave its
    `features`. Raises TFMQError for an unknown feature.
    """
    state = require_stage(gm, "calibrated", "reconstructed")
    asked = set(features) - set(state.outside)
    if unknown := sorted(asked - set(state.features)):
        raise TFMQError(
            f"features: {unknown[0]!r} is not a temporal feature; features are {nearest_names(unknown[0], state.features)}."
        )
    names = [name for name in state.features if name in asked]
    if not names:
        return PassResult(gm, False)
    before = separate(gm, temporal_of(gm))
    read, nodes = constants_read(gm), {n.name: n for n in gm.graph.nodes}
    renamed = {}
    for name in names:
        last = list(placeholders(gm).values())[-1]
        with gm.graph.inserting_after(last):
            renamed[name] = stand_for(nodes[name], gm.graph.placeholder(name), block=set(before))
    rename_layers(gm, renamed)
    _leave(gm, names)
    erase_unneeded(gm, before)
    forget(gm, paths=read - constants_read(gm), nodes=nodes.keys() - {n.name for n in gm.graph.nodes})
    gm.delete_all_unused_submodules()
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, True)


def _leave(gm: GraphModule, names: list[str]) -> None:
    """Record that these features are inputs now."""
    state = state_of(gm)
    kept = [i for i, name in enumerate(state.features) if name not in names]

    left = dataclasses.replace(
        state,
        outside=(*state.outside, *names),
        features=tuple(state.features[i] for i in kept),
        feature_keys=tuple(state.feature_keys[i] for i in kept),
        feature_paths=tuple(state.feature_paths[i] for i in kept),
    )
    set_state(gm, left)
