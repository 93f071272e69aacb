"""From a network and an example of its calls to a graph, and how that is called."""
