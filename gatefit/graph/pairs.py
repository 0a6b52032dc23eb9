"""Find pairs of layers that follow each other, for networks without a residual block, such as VGG.

A channel gate needs no shortcut: closing a channel between two layers saves a row of the first and a column of the
second (feature boosting and suppression, arXiv 1810.05331, gates VGG so).
"""

from collections import Counter
from dataclasses import replace

from torch import fx, nn

from gatefit.graph.blocks import ChannelUnits, FoundBlocks, Layer, ResidualBlock, match_blocks
from gatefit.graph.channels import NoChannelGate, units_from, with_channel_units
from gatefit.graph.macs import layer_name, node_macs
from gatefit.graph.trace import call_counts, module_of, shape_of
from gatefit.graph.tracer import WEIGHTED

_WORTH = 2
"""A gate may cost one such part of the MACs that it can save: one on a long flat input costs as much as its layer."""


def find_gatable(traced: fx.GraphModule) -> FoundBlocks:
    """Find the residual blocks of a traced network whose nodes carry shapes, or where it has none the pairs."""
    found = with_channel_units(traced, match_blocks(traced))
    return found if found.blocks else replace(found, blocks=_pairs(traced))


def _pairs(traced: fx.GraphModule) -> tuple[ResidualBlock, ...]:
    """Pair layers so that each is in one pair at most, and the work of all pairs is the most.

    Each layer's work then shrinks in proportion to the open channels of one gate.

    Example: of conv1 -> relu -> conv2 -> relu -> conv3 -> relu -> conv4 the pairs are (conv1, conv2), (conv3, conv4)
    if all have the same work.
    """
    cone = frozenset(node.name for node in traced.graph.nodes if node.op != "output")
    calls = call_counts(traced)
    candidates = [pair for node in traced.graph.nodes if (pair := _pair(traced, calls, node, cone)) is not None]
    places = {node.name: i for i, node in enumerate(traced.graph.nodes)}
    best: list[tuple[int, tuple[ResidualBlock, ...]]] = [(0, ())] * (len(places) + 1)
    for place in range(1, len(best)):  # the best pairs of the first nodes, one node more each time
        best[place] = best[place - 1]
        for pair in candidates:
            if places[pair.output] == place - 1:
                work, before = best[places[pair.layers[0].node]]
                best[place] = max(best[place], (work + pair.macs, (*before, pair)), key=lambda some: some[0])
    return best[-1][1]


def _pair(traced: fx.GraphModule, calls: Counter[str], start: fx.Node, cone: frozenset[str]) -> ResidualBlock | None:
    """Pair a layer with the one that reads its channels, and those that take them one by one in between."""
    module = module_of(traced, start)
    if not isinstance(module, WEIGHTED):
        return None
    entry, images = start.all_input_nodes[0], shape_of(next(iter(traced.graph.nodes)))
    try:
        units = units_from(traced, calls, cone, entry, start, module, lenient=False)
    except NoChannelGate:
        return None
    shape = shape_of(entry)
    if units.consumer is None or shape is None or images is None or shape[0] != images[0]:
        return None
    axis = len(shape) - 1 if isinstance(module, nn.Linear) else 1
    nodes = {node.name: node for node in traced.graph.nodes}
    end = nodes[units.consumer.node]
    between = _between(start, end)
    layers = _layers(traced, between, units)
    work = sum(layer.macs for layer in layers)
    if shape[axis] * units.units * _WORTH > work:
        return None
    return ResidualBlock(
        name=layer_name(start),
        add=_shown(traced, end),
        entry=entry.name,
        output=end.name,
        nodes=frozenset(node.name for node in between),
        features=shape[axis],
        entry_axis=axis,
        layers=layers,
        channel_units=units,
        has_shortcut=False,
    )


def _layers(traced: fx.GraphModule, between: list[fx.Node], units: ChannelUnits) -> tuple[Layer, ...]:
    weighted = [n for n in between if layer_name(n) in units.scaled]
    return tuple(
        Layer(layer_name(n), n.name, node_macs(traced, n), scaled=True, first=i == 0) for i, n in enumerate(weighted)
    )


def _between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """List the nodes on all ways from `start` to `end`, both included, in their order."""
    reached = {start}
    for node in start.graph.nodes:
        if any(source in reached and source is not end for source in node.all_input_nodes):
            reached.add(node)
    needed = {end}
    for node in reversed(start.graph.nodes):
        if node in reached and any(user in needed for user in node.users):
            needed.add(node)
    return sorted(reached & needed)


def _shown(traced: fx.GraphModule, end: fx.Node) -> str:
    """Name the node behind a pair whose value a network with folded batch norms has too; '' if there is none."""
    node = end
    while node is end or type(module_of(traced, node)) is nn.BatchNorm2d:
        if len(node.users) != 1:
            return ""
        node = next(iter(node.users))
    return node.name if node.op != "output" and shape_of(node) is not None else ""
