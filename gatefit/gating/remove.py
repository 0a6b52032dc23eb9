"""Take the gates out of a gated network again."""

import copy

from torch import fx

from gatefit.graph.ops import add_compensation, scale


def without_gates(gated: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a gated network without its gates: what it computes where all of them are open.

    Example: conv2(scale(relu(conv1(x)), salience)) becomes conv2(relu(conv1(x))).
    """
    dense = copy.deepcopy(gated)
    for node in list(dense.graph.nodes):
        if node.target in (scale, add_compensation):
            node.replace_all_uses_with(node.args[0])
            dense.graph.erase_node(node)
    dense.graph.eliminate_dead_code()
    dense.delete_all_unused_submodules()
    dense.recompile()
    dense.meta.clear()
    return dense
