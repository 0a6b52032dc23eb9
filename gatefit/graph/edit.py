"""Edits of a graph that several parts of gatefit need."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx


def insert_behind(
    graph: fx.Graph, node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...], behind: fx.Node | None = None
) -> fx.Node:
    """Call `function(node, *args)` behind a node, and let all readers of the node read the result instead.

    Args:
        graph: changed in place.
        node: the first argument of the call.
        args: the other arguments.
        behind: the node after which the call stands; by default `node` itself.

    Returns:
        The new node.
    """
    with graph.inserting_after(behind or node):
        new = graph.call_function(function, (node, *args))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def extract_subgraph(
    traced: fx.GraphModule,
    nodes: Iterable[fx.Node],
    inputs: Mapping[fx.Node, Any],
    outputs: Sequence[fx.Node] | fx.Node,
) -> fx.GraphModule:
    """Make a network of some nodes of another one; it shares their modules.

    Example: of x -> conv1 -> relu -> conv2, the nodes (relu, conv2) with the inputs {conv1: "y"} and the output conv2
    become a network that takes y and returns conv2(relu(y)).

    Args:
        traced: the network.
        nodes: in their order.
        inputs: for each node that is read but is not one of `nodes`, the name of the input that takes its place, or a
            constant that does.
        outputs: what the new network returns: a tuple of several, or one alone.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {n: graph.placeholder(v) if isinstance(v, str) else v for n, v in inputs.items()}
    for node in nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[outputs] if isinstance(outputs, fx.Node) else tuple(copied[n] for n in outputs))
    return fx.GraphModule(traced, graph)
