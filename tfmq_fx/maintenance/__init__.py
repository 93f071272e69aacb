"""Decide how each temporal feature is computed at inference: by the quantized block, or from a table."""
