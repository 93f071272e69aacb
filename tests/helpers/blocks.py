"""Look up what the blocks of a graph contain."""

from tfmq_fx.graph.nodes import weight_argument


def weights_of(block):
    found = []
    for node in block.nodes:
        index = weight_argument(node)
        if index is not None:
            source = node.args[index]
            while source.op != "get_attr":
                source = source.args[0]
            found.append(str(source.target).removesuffix(".weight"))
    return found


def layer_paths(gm, names):
    """Return the module paths of the weighted layers among these nodes."""
    nodes = [n for n in gm.graph.nodes if n.name in set(names)]
    layers = [(n, weight_argument(n)) for n in nodes]
    return {str(n.args[i].target).removesuffix(".weight") for n, i in layers if i is not None}
