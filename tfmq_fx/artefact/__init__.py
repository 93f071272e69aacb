"""Save and load a quantized network, and call it like the float network."""
