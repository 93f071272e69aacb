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
