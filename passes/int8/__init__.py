"""Rewrite a quantized graph into what int8 kernels take: the same integers."""
