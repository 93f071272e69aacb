"""Graph passes. Each takes a GraphModule, returns a GraphModule or a finding, and can be called alone."""

from tfmq_fx.graph.state import captured_of
from tfmq_fx.passes.clean.batch_rows import batch_rows
from tfmq_fx.passes.clean.bind_parameters import bind_parameters
from tfmq_fx.passes.clean.flatten_timestep import flatten_timestep
from tfmq_fx.passes.clean.fold_parameters import fold_parameters
from tfmq_fx.passes.clean.inline_modules import inline_modules
from tfmq_fx.passes.clean.inline_regions import inline_regions
from tfmq_fx.passes.clean.keep_batch import keep_batch
from tfmq_fx.passes.clean.linear_matmuls import linear_matmuls
from tfmq_fx.passes.clean.literal_dtypes import literal_dtypes
from tfmq_fx.passes.clean.merge_variants import merge_variants
from tfmq_fx.passes.clean.move_to_device import move_to_device
from tfmq_fx.passes.clean.offload_weights import offload_weights, return_weights
from tfmq_fx.passes.clean.remove_noops import remove_noops
from tfmq_fx.passes.clean.root_batch_size import root_batch_size
from tfmq_fx.passes.clean.values_of_copies import values_of_copies
from tfmq_fx.passes.int8.bfloat16_glue import bfloat16_glue
from tfmq_fx.passes.int8.byte_activations import byte_activations
from tfmq_fx.passes.int8.complex_as_real import complex_as_real
from tfmq_fx.passes.int8.cuda_kernels import cuda_kernels
from tfmq_fx.passes.int8.flatten_linears import flatten_linears
from tfmq_fx.passes.int8.float8_kernels import float8_kernels
from tfmq_fx.passes.int8.fuse_epilogues import fuse_epilogues
from tfmq_fx.passes.int8.integer_weights import integer_weights
from tfmq_fx.passes.int8.look_up_together import look_up_together
from tfmq_fx.passes.int8.merge_linears import merge_linears
from tfmq_fx.passes.int8.norms_by_channel import norms_by_channel
from tfmq_fx.passes.int8.onednn_kernels import onednn_kernels
from tfmq_fx.passes.int8.rescale_temporal import rescale_temporal
from tfmq_fx.passes.int8.rescale_tokens import rescale_tokens
from tfmq_fx.passes.int8.round_float8 import round_float8
from tfmq_fx.passes.int8.share_quantized import share_quantized
from tfmq_fx.passes.int8.signed_activations import signed_activations
from tfmq_fx.passes.int8.signed_weights import signed_weights
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.int8.unfold_convolutions import unfold_convolutions
from tfmq_fx.passes.low_bits.low_rank import low_rank
from tfmq_fx.passes.low_bits.rotate import rotate
from tfmq_fx.passes.low_bits.smooth import smooth
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.quantize.cache_temporal import cache_temporal
from tfmq_fx.passes.quantize.cast_glue import cast_glue
from tfmq_fx.passes.quantize.convert import convert
from tfmq_fx.passes.quantize.find_blocks import Block, find_blocks
from tfmq_fx.passes.quantize.float_at_unseen import float_at_unseen
from tfmq_fx.passes.quantize.open_temporal import open_temporal
from tfmq_fx.passes.quantize.prepare import prepare, prepare_float
from tfmq_fx.passes.quantize.state import State, state_of
from tfmq_fx.passes.temporal.find_temporal import TemporalBlock, find_temporal
from tfmq_fx.passes.temporal.flatten_entries import flatten_entries
from tfmq_fx.passes.temporal.insert_step_index import insert_step_index
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal, partition_temporal
from tfmq_fx.passes.temporal.sink_repeats import sink_repeats
from tfmq_fx.passes.temporal.undo_joins import undo_joins

__all__ = [
    "TO_INT8",
    "Block",
    "PassManager",
    "State",
    "TemporalBlock",
    "batch_rows",
    "bfloat16_glue",
    "bind_parameters",
    "byte_activations",
    "cache_temporal",
    "captured_of",
    "cast_glue",
    "complex_as_real",
    "convert",
    "cuda_kernels",
    "extract_temporal",
    "find_blocks",
    "find_temporal",
    "flatten_entries",
    "flatten_linears",
    "flatten_timestep",
    "float8_kernels",
    "float_at_unseen",
    "fold_parameters",
    "fuse_epilogues",
    "inline_modules",
    "inline_regions",
    "insert_step_index",
    "integer_weights",
    "keep_batch",
    "linear_matmuls",
    "literal_dtypes",
    "look_up_together",
    "low_rank",
    "merge_linears",
    "merge_variants",
    "move_to_device",
    "norms_by_channel",
    "offload_weights",
    "onednn_kernels",
    "open_temporal",
    "partition_temporal",
    "prepare",
    "prepare_float",
    "remove_noops",
    "rescale_temporal",
    "rescale_tokens",
    "return_weights",
    "root_batch_size",
    "rotate",
    "round_float8",
    "share_quantized",
    "signed_activations",
    "signed_weights",
    "sink_repeats",
    "smooth",
    "state_of",
    "undo_joins",
    "unfold_convolutions",
    "values_of_copies",
]
