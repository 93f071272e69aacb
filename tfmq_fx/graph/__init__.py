"""What a node is: which inputs carry values, what is a view, what has a weight, where channels come from."""
