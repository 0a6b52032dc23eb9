"""Edits of a graph that several parts of gatefit need."""

from collections.abc import Callable
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
