"""From the float graph to integers: the passes that change numbers."""
