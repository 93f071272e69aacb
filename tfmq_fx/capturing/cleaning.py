"""The passes that tidy what torch.export made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.artefact.interface import VARIANT
from tfmq_fx.passes.clean.flatten_timestep import flatten_timestep
from tfmq_fx.passes.clean.fold_parameters import fold_parameters
from tfmq_fx.passes.clean.inline_regions import inline_regions
from tfmq_fx.passes.clean.keep_batch import keep_batch
from tfmq_fx.passes.clean.linear_matmuls import linear_matmuls
from tfmq_fx.passes.clean.literal_dtypes import literal_dtypes
from tfmq_fx.passes.clean.merge_variants import merge_variants
from tfmq_fx.passes.clean.remove_noops import remove_noops
from tfmq_fx.passes.clean.root_batch_size import root_batch_size
from tfmq_fx.passes.temporal.flatten_entries import flatten_entries
from tfmq_fx.passes.temporal.sink_repeats import sink_repeats
from tfmq_fx.passes.temporal.undo_joins import undo_joins


def cleaning(timestep: str) -> list[Callable[[GraphModule], PassResult]]:
    """Return the passes that clean a captured graph, in the order in which they run.

    The graph's results stay bitwise equal, but for a few roundings where the block's layers get fewer rows.
    """
    return [
        inline_regions,
        remove_noops,
        keep_batch,
        undo_joins,
        literal_dtypes,
        partial(merge_variants, kinds=VARIANT),
        partial(flatten_timestep, timestep=timestep),
        partial(root_batch_size, timestep=timestep),
        linear_matmuls,
        fold_parameters,
        partial(sink_repeats, timestep=timestep),
        partial(flatten_entries, timestep=timestep),
    ]
