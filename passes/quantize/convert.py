"""Convert a prepared graph to the quantized one: integer weights and quantize/dequantize pairs."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn
from torch.fx import GraphModule

from tfmq_fx.base._torchao import Q_ANNOTATION_KEY, convert_pt2e
from tfmq_fx.base.ambient import neutral
from tfmq_fx.graph.nodes import fresh, plain_strides, set_buffer, set_parameter
from tfmq_fx.graph.state import set_state
from tfmq_fx.graph.written import keeps_buffers
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.quantize.batch_norms import hide_batch_norms, show_batch_norms
from tfmq_fx.passes.quantize.state import require_stage, temporal_of
from tfmq_fx.passes.temporal.partition_temporal import partition_temporal


@declare(needs=("calibrate",), after=("reconstruct", "cache_temporal", "maintain", "float_at_unseen"))
@neutral()
@keeps_buffers  # torchao folds constants by running what reads nothing else
def convert(gm: GraphModule) -> GraphModule:
    """Return a new GraphModule that computes what the calibrated graph computed, from integers.

        observer(w)            ==>  dequantize_per_channel(w_q, w_scale, w_zero_point), reshaped where w has groups
        fake_quantize(x)       ==>  dequantize_per_tensor(quantize_per_tensor(x, s, z))
                                    dequantize_per_token(quantize_per_token(x, s(x), 0)) with a scale per token
        observer(x, step)      ==>  dequantize(quantize(x, scale[step], zero_point[step]))

    The temporal block becomes the submodule `temporal_block`. Weights are bitwise those of the fake-quantized
    graph. An activation with one scale per tensor may differ by one quantization step at a rounding tie.
    """
    state = require_stage(gm, "calibrated", "reconstructed")
    gm = to_integers(gm)
    for path, x in [*gm.named_parameters(), *gm.named_buffers()]:  # as they are once saved and loaded
        if (plain := plain_strides(x.detach())).stride() != x.stride():
            (set_parameter if isinstance(x, nn.Parameter) else set_buffer)(gm, path, plain)
    gm.meta = {}  # remove torchao's marks
    set_state(gm, dataclasses.replace(state, stage="converted"))
    partition_temporal(gm, temporal=temporal_of(gm))
    return gm


def to_integers(gm: GraphModule) -> GraphModule:
    """Replace the observers of a calibrated graph, or of a part of it, with integers and quantize/dequantize pairs."""
    # Our observers' convert hooks fold the weights that they quantize. torchao folds those of other quantizers.
    gm = fresh(gm)
    hide_batch_norms(gm)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):  # torchao draws random numbers
        warnings.simplefilter("ignore", DeprecationWarning)
        gm = convert_pt2e(gm)
    show_batch_norms(gm)
    for node in (
        gm.graph.nodes
    ):  # an annotation names nodes of the prepared graph, which would keep all float weights
        node.meta.pop(Q_ANNOTATION_KEY, None)
    return fresh(
        gm
    )  # keeps only what the graph reads, so the float weights are dropped, and no node that was erased
