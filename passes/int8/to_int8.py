"""The prelude of every lowering and export: what gives a quantized graph the form that int8 kernels read."""

from tfmq_fx.passes.int8.byte_activations import byte_activations
from tfmq_fx.passes.int8.complex_as_real import complex_as_real
from tfmq_fx.passes.int8.rescale_temporal import rescale_temporal
from tfmq_fx.passes.int8.rescale_tokens import rescale_tokens

# Runtimes have no complex numbers. Scales that are looked up or computed leave the quantized operators; then every
# activation is a byte.
TO_INT8 = (complex_as_real, rescale_temporal, rescale_tokens, byte_activations)
