"""Facts about nodes: which inputs carry values, what is a view or has a weight, where channels come from."""
