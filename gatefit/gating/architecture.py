"""Tell networks apart by what they compute: blocks of gates, and a digest of the graph."""

import hashlib
import re
from typing import Any

from torch import fx, nn

from gatefit.gating.gates import Gate, gates_of
from gatefit.graph.partial import parts_of

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""What a function is printed with, another in each process."""


def blocks_of(gated: nn.Module) -> list[dict[str, Any]]:
    """Describe the gated blocks, in order of execution, as plain values."""
    return [{"name": n, "features": g.of.features, "units": g.of.units} for n, g in gates_of(gated).items()]


def architecture_of(gated: nn.Module) -> str:
    """Compute a digest of what is computed: each node's function or module with its settings, and what it reads.

    Nodes are counted, not named, and gates are described by `blocks_of`: what a later version calls them does not
    count.
    """
    lines = []
    for path, part in parts_of(gated).items():
        lines += [f"part {path}"] if path else []
        lines += _node_lines(part)
    return hashlib.sha256(_ADDRESS.sub("", "\n".join(lines)).encode()).hexdigest()


def _node_lines(gated: fx.GraphModule) -> list[str]:
    """Write each node of a graph as `architecture_of` takes it."""
    numbers = {node: i for i, node in enumerate(gated.graph.nodes)}
    lines = []
    for node in gated.graph.nodes:
        what: Any = node.target
        if node.op == "call_module":
            module = gated.get_submodule(str(node.target))
            what = "gate" if isinstance(module, Gate) else f"{node.target} {module}"
        elif node.op == "call_function":
            home = str(getattr(what, "__module__", ""))
            what = f"{'gatefit' if home.startswith('gatefit.') else home}.{getattr(what, '__name__', '')}"
        lines.append(f"{node.op} {what} {fx.map_arg((node.args, node.kwargs), lambda n: f'#{numbers[n]}')}")
    return lines


def architecture_of_format_1(gated: nn.Module) -> str:
    """Compute the digest that format 1 kept, which hung on the names of its time."""
    if not isinstance(gated, fx.GraphModule):
        return ""  # format 1 had whole graphs alone
    text = f"{gated.code}{gated}"
    for now, then in (
        ("gatefit_graph_ops_", "gatefit_gates_"),
        ("add_compensation", "add_fill"),
        ("(compensation)", "(fill)"),
    ):
        text = text.replace(now, then)
    return hashlib.sha256(text.encode()).hexdigest()
