"""Quantize the float graph: the passes that change numbers."""
