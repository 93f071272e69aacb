"""What gives a temporal feature at inference: the quantized block, or a table."""
