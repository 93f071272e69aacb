"""Rewrite a quantized graph into the form that int8 kernels take, with the same integers."""
